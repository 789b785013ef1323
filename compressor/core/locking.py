"""One writer to a directory at a time, whichever process it is in."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from compressor.core.errors import UsageError
from compressor.core.files import NO_LINKS

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None

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
        UsageError: Another process holds it, the directory is a link or cannot be written; `writer` names who it may
            be.
    """
    if directory.is_symlink() or (directory / LOCK).is_symlink():
        link = directory if directory.is_symlink() else directory / LOCK
        raise UsageError(f"{link}: is a link, and nothing is written through one; remove it, or give another with -o")
    try:
        release = _acquired(directory)
        (directory / LOCK).write_text(str(os.getpid()), encoding="ascii")
    except Timeout as error:
        raise UsageError(
            f"{directory}: another {writer} is writing here{_holder(directory)}; wait until it is done, or give "
            "another directory with -o"
        ) from error
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"{directory}: cannot be written; {error.strerror}; give another directory with -o") from error
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        reasons = {errno.EROFS: "is on a read-only disk", errno.ELOOP: "is a link, and nothing is written through one"}
        reason = reasons.get(error.errno, f"cannot be written; {error.strerror}")
        raise UsageError(f"{directory}: {reason}; give another directory with -o") from error
    try:
        yield
    finally:
        # The file goes while it is held: whoever opened it before finds that it is no longer the one of this name.
        (directory / LOCK).unlink(missing_ok=True)
        release()
        with contextlib.suppress(OSError):  # gone, or something is in it
            directory.rmdir()


def _acquired(directory: Path) -> Callable[[], None]:
    """Holds the lock of a directory that is made for it; what lets it go."""
    if fcntl is None:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK, timeout=0)
        lock.acquire()
        return lock.release
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o644)
        except FileNotFoundError:  # its last holder has just removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(descriptor, directory / LOCK):
                return lambda: os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise Timeout(str(directory / LOCK)) from None  # its number would read as a want of processes
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
