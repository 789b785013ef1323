"""What does jobs in the tests of a pool; a module of its own, since workers import it."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from compressor.core.errors import CheckpointError
from compressor.core.log import LOGGER


class Doer:
    """Does what the job's name says, and notes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, job: str) -> None:
        (self.folder / job).open("a").write("x")
        print("what a library prints")
        match job:
            case "refuse":
                raise CheckpointError("model: is refused")
            case "fail":
                raise ValueError("a bug")
            case "no memory":
                raise MemoryError("none left")
            case "warn":
                LOGGER.warning("one may have %s it", "missed")
            case "gone":
                (self.folder / "nowhere" / "file").read_text()
            case "full":
                raise OSError(errno.ENOSPC, "No space left on device", "file")
            case "short":
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
