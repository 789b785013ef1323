"""A few of the ends that scripts/check_crashes.py tries, in a process that may be forked: it has no threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from scripts.crashing import Crash, Step, crashes

ROOT = Path(__file__).parents[2]


def test_whenever_a_run_ends_an_artifact_is_whole_and_the_next_command_goes_on():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts" / "check_crashes.py"), "--short"], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.findall(
        r"^(\S+) \{'steps': (\d+), 'crashes': (\d+), 'commands': (\d+), 'failures': 0", done.stdout, re.M
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert [name for name, *_ in found] == ["fresh", "resume", "force", "batch", "batch-force"]
    for _, steps, n_crashes, n_commands in found:
        assert int(steps) > 60
        assert int(n_crashes) == int(n_commands) > 2


def test_writes_are_ended_at_the_first_a_middle_and_the_last():
    steps = [Step(0, "mkdir", "a"), *(Step(n, "write", "a/b") for n in range(1, 8)), Step(8, "rename", "a/b")]
    assert crashes(steps) == [
        Crash(0), Crash(1), Crash(1, True), Crash(4), Crash(4, True), Crash(7), Crash(7, True), Crash(8),
    ]  # fmt: skip
