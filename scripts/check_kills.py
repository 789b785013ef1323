#!/usr/bin/env python3
"""Kills runs at random moments, resumes each until it is done, and compares its bytes with an undisturbed run's.

scripts/check_kills.py [--runs 30] [--seed 0] [--disks]. Each run is killed at least once, and every other time again.
With --disks also: a disk that fills up, and one that cannot be written (as root, on Linux). Writes
docs/measured/kills.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from measured import markdown, read_results, write_results  # noqa: E402

RECIPE = """
passes: [{pass: jlcm, width: 4, dim: 2, group: 16, block_steps: 3}]
calibration: {tokens: 512, window: 32}
embeddings: {bits: 4, group: 16}
distill: {steps: 4, tokens: 512}
evaluation: {tokens: 0}
"""
MADE_AGAIN = ("compression.json", "report.html", "README.md")


def kills_table(results: dict[str, Any]) -> str:
    """What came of the kills, and what was said of the disks."""
    titles = ["runs", "SIGKILLs", "artifacts with the same bytes"]
    table = markdown(titles, [[results["runs"], results["kills"], results["same_bytes"]]])
    disks = [f"A disk that is {name}: status {text.replace(': Error: ', ', `', 1)}`." for name, text in
             results.get("disks", {}).items()]  # fmt: skip
    return "\n\n".join([table, *disks])


def command(output: Path, *more: str) -> list[str]:
    words = ["run", "llama", "--recipe", "recipe.yaml", "-o", str(output), "--data", "calibration.txt"]
    return [sys.executable, "-m", "compressor", *words, "--eval", "evaluation.txt", *more]


def start(folder: Path, output: Path, *more: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COMPRESSOR_HOME": str(folder / "home"),
    }
    return subprocess.Popen(
        command(output, *more), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in MADE_AGAIN]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_run(folder: Path, output: Path, seconds: float, generator: random.Random) -> int:
    """A run that is killed at any moment of its `seconds`, and resumed until it is done; how often it was killed."""
    kills = 0
    partial = output.with_name(output.name + ".partial")
    while not output.exists():
        resumable = (partial / "work" / "run.json").exists()
        process = start(folder, output, *(["--resume"] if resumable else []))
        last = kills and generator.random() < 0.5
        try:
            printed, _ = process.communicate(timeout=None if last else generator.uniform(0.05, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        if process.returncode:
            raise SystemExit(f"after {kills} kills: exit status {process.returncode}\n{printed}")
    return kills


def refused_disks(folder: Path) -> dict[str, str]:
    """What a run says on a disk that is too small, and on one that cannot be written."""
    found = {}
    for name, flags in (("full", "size=200k"), ("read-only", "size=1m,ro")):
        mount = folder / name
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "tmpfs", str(mount)], check=True)
        try:
            process = start(folder, mount / "out")
            printed, _ = process.communicate()
            last = printed.strip().splitlines()[-1].replace(str(folder), "…")
            found[name] = f"{process.returncode}: {last}"
            if (mount / "out").exists():
                raise SystemExit(f"{name}: an artifact appeared")
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    return found


def main() -> None:
    from tests import pico  # on use: who only wants the table need not wait for torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="that are killed at least once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disks", action="store_true", help="full and read-only ones as well; mounts, so as root")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pico.llama(folder / "llama")
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "calibration.txt").write_text(pico.text(1))
        (folder / "evaluation.txt").write_text(pico.text(2))
        started = time.monotonic()
        printed, _ = start(folder, folder / "whole").communicate()
        seconds = time.monotonic() - started
        wanted = digests(folder / "whole")
        assert wanted, printed
        runs, kills, same, number = 0, 0, 0, 0
        while runs < options.runs:
            output = folder / f"killed{number}"
            n, number = killed_run(folder, output, seconds, generator), number + 1
            alike = digests(output) == wanted
            shutil.rmtree(output)
            if not n:  # it was faster than the moment that was drawn for it
                continue
            runs, kills, same = runs + 1, kills + n, same + alike
            print(f"run {runs}: {n} kills, {'the same bytes' if alike else 'OTHER BYTES'}", flush=True)
        found = {"runs": runs, "kills": kills, "same_bytes": same, "seconds_of_a_run": round(seconds, 1)}
        found["disks"] = read_results("kills").get("disks", {})
        if options.disks:
            found["disks"] = refused_disks(folder)
    print(found)
    write_results("kills", found)
    sys.exit(same != runs)


if __name__ == "__main__":
    main()
