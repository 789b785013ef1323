"""One writer to a directory at a time, whichever process it is in."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from compressor.core.errors import UsageError

LOCK = ".lock"


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
    except Timeout as error:
        raise UsageError(
            f"{directory}: another {writer} is writing here; wait until it is done, or give another directory with -o"
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
