"""Reading files that others made: regular ones only, up to a size that somebody can have meant, and as text or JSON.

A named pipe that nobody writes to, a device, a socket: opening or reading one may never end. A small file that says a
lot is the business of whoever knows its format; here a large one is refused before it is in memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compressor.core.errors import CheckpointError, CompressorError
from compressor.core.files import resolved
from compressor.core.resources import refuse_shortage

LARGEST_JSON = 64_000_000
"""Bytes: twice the largest tokenizer.json that we know."""
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"),
)  # fmt: skip


def refuse_special(path: Path, kind: type[CompressorError] = CheckpointError, folders: bool = False) -> None:
    """Refuses what is there and no regular file, or link to one: its end may never come.

    Args:
        kind: Of the error.
        folders: Whether a folder may be there as well.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # whoever reads it says what is wrong
    if stat.S_ISREG(mode) or (folders and stat.S_ISDIR(mode)):
        return
    what = next((name for test, name in _KINDS if test(mode)), "no regular file")
    raise kind(f"{path}: is {what}; only regular files are read; save it as a file and give that")


def read_bytes(path: Path, most: int, kind: type[CompressorError] = CheckpointError) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        CompressorError: Of this kind: it is another kind of file, too large, or cannot be read.
    """
    refuse_special(path, kind)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise kind(f"{path}: has {size:,} bytes; expected at most {most:,}; give the right file")
            return file.read(most)
    except (OSError, ValueError) as error:
        refuse_shortage(error)
        raise kind(f"{path}: cannot be read; {getattr(error, 'strerror', None) or error}") from error


def read_text(path: Path, most: int = LARGEST_JSON, kind: type[CompressorError] = CheckpointError) -> str:
    """The UTF-8 text of a regular file; as `read_bytes` else."""
    try:
        return read_bytes(path, most, kind).decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: is not UTF-8; found byte 0x{error.object[error.start]:02x} at {error.start}") from error


def read_json(
    path: Path, kind: type[CompressorError] = CheckpointError, most: int = LARGEST_JSON, measured: bool = False
) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        measured: Whether numbers in it were measured; only such can be NaN, a setting cannot.

    Raises:
        CompressorError: Of this kind: it cannot be read, is no JSON object, or holds NaN or half a character.
    """
    return parse_json(read_bytes(path, most, kind), str(path), kind, measured)


def parse_json(
    raw: bytes, where: str, kind: type[CompressorError] = CheckpointError, measured: bool = False
) -> dict[str, Any]:
    """A JSON object; `where` it stands, for the error."""

    def constant(word: str) -> float:
        if word == "NaN" and not measured:
            raise kind(f"{where}: holds NaN, which no setting can be; write the number that was meant")
        return float(word)

    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=constant)
    except ValueError as error:
        raise kind(f"{where}: is not valid JSON; {error}; repair the file or fetch it again") from error
    except RecursionError as error:
        raise kind(f"{where}: is nested too deeply; repair the file or fetch it again") from error
    if not isinstance(content, dict):
        raise kind(f"{where}: holds a JSON {type(content).__name__}; an object was expected")
    if _ESCAPED_HALF.search(raw) and not _can_be_written(content):
        raise kind(f"{where}: holds half of a character (a lone surrogate); repair the file or fetch it again")
    return content


def _can_be_written(content: dict[str, Any]) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_outside(file: Path, folder: Path) -> Path:
    """The file, which `folder` holds; links to elsewhere are refused before anything is read.

    A hub's cache keeps `snapshots/<revision>/<name>` as links into `blobs` beside `snapshots`: those are followed.

    Raises:
        CheckpointError: It leads out of the folder, or to what is no file.
    """
    try:
        found = file.resolve(strict=True)
        is_file = stat.S_ISREG(found.stat().st_mode)
    except (OSError, RuntimeError) as error:  # nowhere, or in a circle
        raise CheckpointError(f"{file}: is a link that leads nowhere; fetch the file") from error
    if not is_file:
        raise CheckpointError(f"{file}: is no regular file; put the file itself there")
    if not is_inside(file, folder):
        raise CheckpointError(
            f"{file}: is a link to {found}, which is outside of the model's folder; nothing was read there; put the "
            "file itself into the folder if it belongs to the model"
        )
    return file


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuses these of a folder's files where they are links to elsewhere; there may be none of a name.

    Raises:
        CheckpointError: One leads out of the folder, or to what is no file.
    """
    for name in names:
        if (folder / name).is_symlink():
            refuse_outside(folder / name, folder)


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, wherever links lead, is in a folder or in the blobs of the hub's cache that the folder is of."""
    return any(resolved(file).is_relative_to(place) for place in _places(resolved(folder)))


def _places(folder: Path) -> Iterator[Path]:
    """The folder itself, and the blobs of a hub's cache that it is a snapshot in."""
    yield folder
    for each in (folder, *folder.parents):
        if each.parent.name == "snapshots" and each.parent.parent.name.count("--"):
            yield each.parent.parent / "blobs"
