"""An artifact: a directory that compress wrote, and what compression.json says of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.core.errors import CheckpointError, UsageError

REPORT = "compression.json"
PAGE = "report.html"
WEIGHTS = "model.safetensors"
NOT_NEEDED = (REPORT, PAGE)
"""Files of an artifact that say what it is; it runs without them."""


@dataclass(frozen=True)
class Artifact:
    """`report` is the content of compression.json."""

    directory: Path
    report: dict[str, Any]

    @classmethod
    def open(cls, directory: Path | str) -> Artifact:
        """The artifact in a directory.

        Raises:
            CheckpointError: It holds none, or a damaged one.
        """
        path = Path(directory) / REPORT
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{directory}: is no artifact, it has no {REPORT}; give a directory that compress wrote"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: is not valid JSON; {error}; compress again") from error
        except RecursionError as error:
            raise CheckpointError(f"{path}: is nested too deeply; compress again") from error
        if not isinstance(report, dict):
            raise CheckpointError(f"{path}: holds no JSON object; compress again")
        from compressor.core.report import misshapen

        wrong = misshapen(report)
        if wrong:
            raise CheckpointError(f"{path}: is damaged; {wrong}; compress again")
        return cls(Path(directory), report)


def damaged_files(artifact: Artifact) -> list[str]:
    """The files whose SHA-256 is not the one that compression.json holds, or that are gone, each with what is wrong."""
    recorded = artifact.report.get("sha256")
    if not isinstance(recorded, dict) or not recorded:
        return [f"{REPORT} holds no hashes"]
    found = []
    for name, digest in recorded.items():
        path = artifact.directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            found.append(f"{name} is no file of the artifact")
        elif not path.is_file():
            found.append(f"{name} is gone")
        elif file_digest(path) != digest:
            found.append(f"{name} has changed")
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_artifact(directory: Path) -> bool:
    """Whether compress wrote this directory."""
    return (directory / REPORT).is_file()


def failed_directory(directory: Path) -> Path:
    """Where an artifact that misses a gate is kept."""
    return beside(directory, ".failed")


def beside(directory: Path, suffix: str) -> Path:
    """The directory's sibling whose name has a suffix."""
    named = directory if directory.name not in ("", "..") else directory.resolve()
    return named.with_name(named.name + suffix)


def refuse_target(directory: Path, force: bool = False) -> None:
    """Refuses to write over anything but an artifact, and over an artifact only by `force`.

    Raises:
        UsageError: Something stands there.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; give a directory with -o")
    failed = failed_directory(directory)
    if failed.exists() and not is_artifact(failed):
        raise UsageError(f"{failed}: is in the way and not ours; move it, or give another directory with -o")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not is_artifact(directory):
        raise UsageError(f"{directory}: is not empty and no artifact of ours; give another directory with -o")
    if not force:
        raise UsageError(f"{directory}: holds an artifact already; replace it with --force, or give another with -o")
