"""Files that appear whole or not at all, whenever a process or the machine ends; none is written through a link."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from compressor.core.errors import UsageError

NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_AT_CWD, _EXCHANGE = -100, 2
"""Of renameat2(2); macOS' renamex_np takes the same flag for a swap."""
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def resolved(path: Path) -> Path:
    """Where links lead, as an absolute path; links that go in a circle are left as they are, and no error."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written there takes the name at the end, in one step and synced.

    Where the block raises, nothing is left of it and what `path` was stays. A crash can leave the file beside it,
    `.<name>.partial`, which the next write replaces. A link at `path` is itself replaced: what it points to stays.

    Raises:
        UsageError: There is a folder, a device or a pipe at `path`, which no file may replace, or no folder for it.
    """
    _refuse_replacing(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _refuse_replacing(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):  # nothing is there, or no name can be
        if path.name and not path.parent.is_dir():
            raise UsageError(f"{path}: its folder is not there; make it, or give another file") from None
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UsageError(f"{path}: is {what}, and is not replaced; give another file")


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """A text in UTF-8."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def open_to_append(path: Path) -> int:
    """The descriptor of a file to append to, made where it is not there.

    Raises:
        OSError: ELOOP: there is a link.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINKS, 0o644)


LONGEST_NAME = 200
"""Bytes of a file's name that leave room for what is put behind it; systems allow 255."""


def short_name(name: str) -> str:
    """The name itself, or where it is too long its start and a digest of it; never two parts of a path."""
    name = name.replace("/", "∕").replace("\0", "�")
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:  # half a letter, as JSON can hold it and no file system
        name = name.encode(errors="replace").decode()
        raw = os.fsencode(name)
    if len(raw) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:10]
    return f"{raw[: LONGEST_NAME - 11].decode(errors='ignore')}-{digest}"


def sync(path: Path) -> None:
    """A file's bytes, or a folder's names, to the disk itself; where the system cannot, nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Every file and every name in a folder, and the folder's own."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)
    sync(folder.parent)


def put(finished: Path, target: Path, aside: Path) -> None:
    """Gives a finished folder the name of another that may be there, in one step where the disk can.

    What stood there is then called `finished`, or where it took two steps, `aside`.
    """
    if not target.exists() or not any(target.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        finished.rename(target)
    elif not exchange(finished, target):
        target.rename(aside)
        sync(target.parent)
        finished.rename(target)
    sync(target.parent)


def exchange(first: Path, second: Path) -> bool:
    """Gives two files or folders each the other's name, in one step; whether the system can."""
    swap = _exchanging()
    if swap is None:
        return False
    ctypes.set_errno(0)
    if swap(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_CALL:
        return False
    raise OSError(code, os.strerror(code), str(second))


@functools.cache
def _exchanging() -> Callable[[bytes, bytes], int] | None:
    """The system's call, which Linux has since 3.15 and macOS since 10.12; not every kind of disk knows it."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            call = library.renamex_np
            return lambda first, second: call(first, second, ctypes.c_uint(_EXCHANGE))
        call = library.renameat2
        return lambda first, second: call(_AT_CWD, first, _AT_CWD, second, ctypes.c_uint(_EXCHANGE))
    except (AttributeError, OSError, TypeError):
        return None


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it; a link's target stays. What is not there is none."""
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if is_folder:
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def links_in(folder: Path) -> list[Path]:
    """The symbolic links in a folder, at any depth; they are not followed."""
    found = [Path(root) / name for root, folders, files in os.walk(folder) for name in (*folders, *files)]
    return sorted(path for path in found if path.is_symlink())
