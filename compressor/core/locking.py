"""One writer to a directory at a time, whichever process it is in."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from compressor.core.errors import UsageError

LOCK = ".lock"


def is_held(directory: Path) -> bool:
    """Whether a process holds the directory's lock now."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # gone meanwhile
        return False


def _holder(directory: Path) -> str:
    """Which process it is, where it has said so."""
    with contextlib.suppress(OSError, ValueError):
        return f", process {int((directory / LOCK).read_text(encoding='ascii'))}"
    return ""


@contextlib.contextmanager
def locked(directory: Path, writer: str) -> Iterator[None]:
    """Makes the directory and holds its lock; a directory that is left empty is removed.

    Raises:
        UsageError: Another process holds it, or the directory cannot be written; `writer` names who it may be.
    """
    lock = FileLock(directory / LOCK, timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (directory / LOCK).write_text(str(os.getpid()), encoding="ascii")
    except Timeout as error:
        raise UsageError(
            f"{directory}: another {writer} is writing here{_holder(directory)}; wait until it is done, or give "
            "another directory with -o"
        ) from error
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"{directory}: cannot be written; {error.strerror}; give another directory with -o") from error
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise UsageError(f"{directory}: is on a read-only disk; give another directory with -o") from error
    try:
        yield
    finally:
        lock.release()
        (directory / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # gone, or something is in it
            directory.rmdir()
