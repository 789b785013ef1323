"""An artifact: a directory that compress wrote, and what compression.json says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.core.errors import CheckpointError

REPORT = "compression.json"


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
        if not isinstance(report, dict):
            raise CheckpointError(f"{path}: holds no JSON object; compress again")
        return cls(Path(directory), report)


def is_artifact(directory: Path) -> bool:
    """Whether compress wrote this directory."""
    return (directory / REPORT).is_file()
