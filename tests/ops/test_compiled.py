"""Compiled loops run whatever has become of numba's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import torch
from compressor.ops.compiled import compiled

@compiled
def twice(x):
    return 2 * x

print(twice(3))
"""


def run(folder: Path) -> str:
    found = subprocess.run(
        [sys.executable, folder / "loop.py"], env=os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache")},
        capture_output=True, text=True,
    )  # fmt: skip
    return found.stdout + found.stderr


@pytest.mark.parametrize("what", ["*.nbi", "*.nbc"])
def test_a_cache_that_was_broken_off_is_made_anew(tmp_path, what):
    (tmp_path / "loop.py").write_text(WORK)
    assert run(tmp_path) == "6\n"
    (file,) = (tmp_path / "cache").rglob(what)
    file.write_bytes(file.read_bytes()[:50])
    assert run(tmp_path) == "6\n"
    assert file.stat().st_size > 50


def test_a_cache_that_cannot_be_written_is_none(tmp_path):
    (tmp_path / "loop.py").write_text(WORK.replace(
        "import torch\n", "import errno, os\n\ndef full(*_):\n    raise OSError(errno.ENOSPC, '')\n\n"
    ).replace("print", "os.replace = full\nprint"))  # fmt: skip
    assert run(tmp_path) == "6\n"
