"""The zip archives of torch.save, opened without trust: read by their directory, as torch reads them.

A zip file says twice where its records lie: in the directory at its end, and before each record. torch goes by the
directory. An archive in which the two disagree, or whose records overlap or have one name, holds other weights for
other readers, and is refused.
"""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from compressor.core.errors import CheckpointError

MAGIC = b"PK\x03\x04"
MOST_INFLATED, MOST_TIMES = 64_000_000, 20
"""Bytes that packed records may come to, or times the size of the file: of weights, a packer saves a tenth."""
BROKEN = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, OverflowError,
    RuntimeError,  # encrypted; and NotImplementedError, a version or a packing that it does not know
)  # fmt: skip
"""What `zipfile` raises for an archive that is damaged, or of a kind that it does not know."""
_LOCAL = struct.Struct("<4s2B4HL2L2H")
_END, _LOCATOR, _END_64 = 22, 20, 56
_ENCRYPTED, _SIZES_BEHIND = 1, 8
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Record:
    """Where the bytes of a record lie in the file, and how many they are once they are unpacked."""

    offset: int
    n_stored: int
    n_bytes: int
    is_packed: bool


def is_archive(path: Path) -> bool:
    """Whether torch takes a file for a zip archive: by its first bytes, whatever is in the rest."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def has_directory(path: Path) -> bool:
    """Whether the directory at the end of an archive is there, in whatever state."""
    try:
        return zipfile.is_zipfile(path)
    except BROKEN:  # it is there and damaged: opening the archive says how
        return True


@contextlib.contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, its directory checked against the file's size.

    Raises:
        CheckpointError: It is damaged, or its packed records would be far larger than weights are: a small file may
            stand for more than memory holds.
    """
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN as error:
        raise CheckpointError(f"{path}: is a damaged archive; {error}; fetch it again") from error
    with archive:
        entries, present = archive.infolist(), path.stat().st_size
        inflated = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
        if inflated > max(MOST_INFLATED, MOST_TIMES * present):
            raise CheckpointError(
                f"{path}: its compressed records would become {inflated} bytes, and torch.save stores tensors as they "
                "are; save the model again with torch.save"
            )
        promised = sum(entry.compress_size for entry in entries)
        if promised > present:
            raise CheckpointError(
                f"{path}: is damaged; its records would be {promised} bytes, the file has {present}; fetch it again"
            )
        names = [entry.filename.lower() for entry in entries]  # torch looks for them in any case of letters
        twice = next((name for name in names if names.count(name) > 1), None) if len({*names}) < len(names) else None
        if twice is not None:
            raise CheckpointError(f"{path}: is damaged; it has two records named '{twice[:60]}'; fetch it again")
        yield archive


def records(path: Path, archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, Record]:
    """The records of torch.save by their names, without that of the folder that the first one lies in.

    `file` is the open archive, `path` its name in messages.

    Raises:
        CheckpointError: The directory and what stands before a record disagree, or records overlap.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    folder = archive.infolist()[0].filename.partition("/")[0] if entries else ""
    found: dict[str, Record] = {}
    end = _directory(file, archive)
    if end != archive.start_dir or not entries or entries[0].header_offset != 0:
        raise _disagreeing(path, "its directory does not count from where the file starts")
    limits = [*(entry.header_offset for entry in entries[1:]), end]
    for entry, limit in zip(entries, limits, strict=True):
        offset = _data_offset(path, file, entry)
        if offset + entry.compress_size > limit:
            raise _disagreeing(path, f"'{entry.filename[:60]}' reaches into the next record")
        packed = entry.compress_type != zipfile.ZIP_STORED
        if not packed and entry.compress_size != entry.file_size:
            raise _disagreeing(path, f"'{entry.filename[:60]}' has two sizes")
        if entry.filename.startswith(f"{folder}/"):
            name = entry.filename.removeprefix(f"{folder}/")
            found[name] = Record(offset, entry.compress_size, entry.file_size, packed)
    return found


def read_record(path: Path, record: Record, into: memoryview) -> int:
    """Fills a buffer with the first bytes of a record; how many there were."""
    with path.open("rb") as file:
        file.seek(record.offset)
        if not record.is_packed:
            return file.readinto(into[: record.n_bytes]) if len(into) else 0
        unpacking, left, done = zlib.decompressobj(-zlib.MAX_WBITS), record.n_stored, 0
        try:
            while done < len(into) and not unpacking.eof:
                packed = unpacking.unconsumed_tail or file.read(min(_CHUNK, left))
                left -= 0 if unpacking.unconsumed_tail else len(packed)
                piece = unpacking.decompress(packed, min(_CHUNK, len(into) - done))
                into[done : done + len(piece)] = piece
                done += len(piece)
                if not packed and not piece:
                    break
        except zlib.error as error:
            raise CheckpointError(f"{path}: a packed record is damaged; {error}; fetch it again") from error
        return done


def _data_offset(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes start, by what stands before them, which has to say the same as the directory."""
    file.seek(entry.header_offset)
    raw = file.read(_LOCAL.size)
    name = f"'{entry.filename[:60]}'"
    if len(raw) < _LOCAL.size:
        raise _disagreeing(path, f"{name} is not in the file")
    magic, _, _, flags, method, _, _, _, stored, size, n_name, n_extra = _LOCAL.unpack(raw)
    written = file.read(n_name).decode("utf-8" if flags & 0x800 else "cp437", errors="replace")
    if magic != MAGIC or written != entry.orig_filename or method != entry.compress_type:
        raise _disagreeing(path, f"{name} is not where it says")
    sizes = {(stored, size), (entry.compress_size, entry.file_size)} - {(2**32 - 1, 2**32 - 1)}
    if not flags & _SIZES_BEHIND and len(sizes) > 1:
        raise _disagreeing(path, f"{name} has two sizes")
    if (flags | entry.flag_bits) & _ENCRYPTED or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"{path}: {name} is encrypted or packed in a way that torch cannot read; save it again")
    return entry.header_offset + _LOCAL.size + n_name + n_extra


def _directory(file: BinaryIO, archive: zipfile.ZipFile) -> int:
    """Where the directory starts, as the record at the end of the file says it."""
    file.seek(0, 2)
    at = file.tell() - _END - len(archive.comment)
    file.seek(at + 16)
    (offset,) = struct.unpack("<L", file.read(4))
    if offset != 2**32 - 1:
        return offset
    file.seek(max(0, at - _LOCATOR))
    locator = file.read(_LOCATOR)
    file.seek(struct.unpack("<Q", locator[8:16])[0] if locator[:4] == b"PK\x06\x07" else 0)
    record = file.read(_END_64)
    return struct.unpack("<Q", record[48:56])[0] if record[:4] == b"PK\x06\x06" else offset


def _disagreeing(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is damaged; {what}, and other readers would take other weights from it; save it again with torch.save"
    )
