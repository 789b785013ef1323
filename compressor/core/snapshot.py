"""Files as they were when a run began, to notice that one was written again while it went on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Seen = tuple[int, int, int]
"""Size, time of the last change of content in nanoseconds, number of the file on its disk."""


@dataclass(frozen=True)
class Snapshot:
    """What the system says of each file; None where it was not there."""

    files: dict[str, Seen | None]

    @classmethod
    def of(cls, paths: Iterable[Path | str]) -> Snapshot:
        """Of files, and of all files in folders."""
        return cls({str(file): _seen(file) for path in paths for file in _files(Path(path).absolute())})

    def __or__(self, other: Snapshot) -> Snapshot:
        return Snapshot(self.files | other.files)

    def changed(self) -> list[str]:
        """The files that are no longer what they were, or are gone."""
        return [name for name, seen in self.files.items() if _seen(Path(name)) != seen]

    def as_json(self) -> dict[str, list[int] | None]:
        return {name: None if seen is None else list(seen) for name, seen in sorted(self.files.items())}


def _files(path: Path) -> list[Path]:
    return [each for each in sorted(path.rglob("*")) if each.is_file()] if path.is_dir() else [path]


def _seen(path: Path) -> Seen | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
