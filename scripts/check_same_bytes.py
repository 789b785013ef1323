#!/usr/bin/env python3
"""Does a run give the same bytes elsewhere? Recipes of every kind on small networks, each under other circumstances.

scripts/check_same_bytes.py [--only llm cnn …] [--short]. Another number of threads, another seed of Python's hashes,
another locale, another time zone, another folder with other times of its files: everything has to be equal but what
compression.json says of cost and of whose run it was. Writes docs/measured/same_bytes.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from measured import markdown, read_results, write_results  # noqa: E402


@dataclass(frozen=True)
class Circumstance:
    """Variables of the environment, and the name of the folder that a run works in."""

    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "sources"


USUAL = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
CIRCUMSTANCES = {
    "again": Circumstance(),
    "two threads": Circumstance({"OMP_NUM_THREADS": "2"}),
    "another hash seed": Circumstance({"PYTHONHASHSEED": "4711"}),
    "locale C, no UTF-8": Circumstance({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "another time zone": Circumstance({"TZ": "Pacific/Kiritimati"}),
    "another folder": Circumstance(folder="a folder/ключ 'ß'"),
}
SHORT = ("onnx", "structure")


def same_bytes_table(results: dict[str, dict[str, list[str]]]) -> str:
    """A row for each kind, a column for each circumstance: how many files differ."""
    rows = [[kind, *(len(each[name]) or "same" if name in each else None for name in CIRCUMSTANCES)]
            for kind, each in results.items()]  # fmt: skip
    return markdown(["kind of recipe", *CIRCUMSTANCES], rows)


def moved(sources: Path, folder: Path) -> Path:
    """The sources under another name, their files of another time and made in another order."""
    if folder != sources and not folder.exists():
        folder.mkdir(parents=True)
        for path in sorted(sources.iterdir(), reverse=True):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        for path in folder.rglob("*"):
            os.utime(path, (1_000_000_000, 1_000_000_000))
    return folder


def main() -> None:
    from compare_trees import (  # on use: who only wants the table need not wait
        RUNS,
        compress,
        differences,
        make_sources,
    )

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--short", action="store_true", help=f"{' and '.join(SHORT)} alone, nothing recorded")
    options = parser.parse_args()
    results: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch) / "sources"
        sources.mkdir()
        make_sources(sources)
        for run in SHORT if options.short else options.only:
            results[run] = {}
            compress(ROOT, sources, Path(scratch) / "usual", run, USUAL)
            for number, (name, each) in enumerate(CIRCUMSTANCES.items()):
                there, output = moved(sources, Path(scratch) / each.folder), Path(scratch) / str(number)
                compress(ROOT, there, output, run, USUAL | each.variables)
                found = differences(Path(scratch) / "usual" / run, output / run)
                results[run][name] = found
                print(f"{run:12} {name:20} {'the same' if not found else '; '.join(found)}", flush=True)
                shutil.rmtree(output)
            if not options.short:
                write_results("same_bytes", read_results("same_bytes") | results)
    sys.exit(any(found for each in results.values() for found in each.values()))


if __name__ == "__main__":
    main()
