"""The zip archives of torch.save, opened without trust: tensors are stored in them, and only code is packed."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from compressor.core.errors import CheckpointError

MOST_INFLATED = 64_000_000
BROKEN = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, OSError, ValueError, EOFError, RuntimeError)
"""What `zipfile` raises for an archive that is damaged, or of a kind that it does not know."""


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive; one whose index is damaged is one as well."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


@contextlib.contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, its index checked against the file's size.

    Raises:
        CheckpointError: It is damaged, or its compressed records would be larger than code is: a small file may stand
            for more than memory holds.
    """
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN as error:
        raise CheckpointError(f"{path}: is a damaged archive; {error}; fetch it again") from error
    with archive:
        entries = archive.infolist()
        inflated = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
        if inflated > MOST_INFLATED:
            raise CheckpointError(
                f"{path}: its compressed records would become {inflated} bytes, and torch.save stores tensors as they "
                "are; save the model again with torch.save"
            )
        promised, present = sum(entry.compress_size for entry in entries), path.stat().st_size
        if promised > present:
            raise CheckpointError(
                f"{path}: is damaged; its records would be {promised} bytes, the file has {present}; fetch it again"
            )
        yield archive
