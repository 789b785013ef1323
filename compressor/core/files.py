"""Files that appear whole or not at all, whenever the process or the machine ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written there takes the name at the end, in one step and synced.

    Where the block raises, nothing is left of it and what `path` was stays. A crash can leave the file beside it,
    `.<name>.partial`, which the next write replaces. The file may be a link's target: the link itself is replaced.
    """
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


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """A text in UTF-8."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


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
