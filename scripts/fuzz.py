#!/usr/bin/env python3
"""Damages files of every kind and reads them: scripts/fuzz.py [READER…] [--files 10000] [--seed 0].

What a reader answers with anything but content or a clear refusal, within 5 s and 500 MB, is counted, and kept in
--keep. Writes docs/measured/fuzz.json.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import logging
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from measured import markdown, number, read_results, write_results  # noqa: E402

SLOW_SECONDS = 5.0
LARGEST = 500_000_000


def fuzz_table(results: dict[str, dict[str, float]]) -> str:
    """A row for each reader."""
    titles = ["reader", "files", "refused", "read", "findings", "slowest, s", "memory grown, MB"]
    rows = [
        [f"`{name}`", number(each["files"]), number(each["refused"], 0), number(each["files"] - each["refused"], 0),
         each["findings"], each["slowest_seconds"], each["memory_grown_mb"]]
        for name, each in results.items()
    ]  # fmt: skip
    return markdown(titles, rows)


def main() -> None:
    from tests.hostile_files.readers import READERS  # on use: who only wants the table need not wait for torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--no-record", action="store_true", help="leave docs/measured alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    results = {}
    for name in options.readers:
        results[name] = fuzz(name, options)
        if not options.no_record:
            write_results("fuzz", read_results("fuzz") | results)
    sys.exit(any(found["findings"] for found in results.values()))


def fuzz(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Counts of one reader; findings are written to the folder of findings."""

    from tests.hostile_files.readers import READERS, attempt, damaged

    generator, kinds = random.Random(f"{options.seed}:{name}"), collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        good = READERS[name].write(Path(scratch))
        content = good.read_bytes()
        attempt(READERS[name], good)  # what is imported on first use is not the file's
        before, slowest, refused = _peak(), 0.0, 0
        for number in range(options.files):
            made = damaged(content, generator)
            good.write_bytes(made)
            started = time.monotonic()
            faulthandler.dump_traceback_later(4 * SLOW_SECONDS, exit=True)
            try:
                refused += attempt(READERS[name], good) is not None
            except (Exception, RecursionError) as error:  # whatever it is, it is a finding
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
                kinds[kind] += 1
                _keep(options.keep, name, number, made, traceback.format_exc(), kinds[kind])
            faulthandler.cancel_dump_traceback_later()
            spent = time.monotonic() - started
            if spent > SLOW_SECONDS:
                kinds["slow"] += 1
                _keep(options.keep, name, number, made, f"{spent:.1f} s", kinds["slow"])
            slowest = max(slowest, spent)
        grown = _peak() - before
    if grown > LARGEST:
        kinds["memory"] += 1
    shown = ", ".join(f"{n} × {kind}" for kind, n in kinds.most_common()) or "none"
    print(f"{name}: {options.files} files, {refused} refused, slowest {slowest:.2f} s, {grown / 1e6:.0f} MB more; "
          f"findings: {shown}", flush=True)  # fmt: skip
    return {
        "files": options.files, "refused": refused, "findings": sum(kinds.values()),
        "slowest_seconds": round(slowest, 2), "memory_grown_mb": round(grown / 1e6),
    }  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _keep(folder: Path, name: str, number: int, content: bytes, text: str, count: int) -> None:
    if count > 3:
        return
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-{number}.bin").write_bytes(content)
    (folder / f"{name}-{number}.txt").write_text(text)


if __name__ == "__main__":
    main()
