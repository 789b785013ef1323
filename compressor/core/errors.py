"""Every error that a user may meet, and the exit status that the command gives it.

CompressorError
├── UsageError          2   an option or an argument that cannot be
│   └── RecipeError     2   a recipe that cannot be run as written
├── CheckpointError     3   a model that cannot be read, or is refused
├── DataError           3   calibration or evaluation data that cannot be read, or overlaps
├── ResourceError       4   out of disk or memory
├── PassError           5   a pass broke its own contract: our bug
├── ExportError         5   an artifact could not be written as planned
├── VerificationError   5   the artifact does not compute what the model computes
└── GateFailed          1   the artifact is whole, but worse than its recipe allows

A message reads: *where: what is wrong; what was found; what to write instead.*
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressorError(Exception):
    """The root: one line for the user, and an exit status."""

    exit_status = 5


class UsageError(CompressorError):
    exit_status = 2


class RecipeError(UsageError):
    pass


class CheckpointError(CompressorError):
    exit_status = 3


class DataError(CompressorError):
    exit_status = 3


class ResourceError(CompressorError):
    exit_status = 4


class PassError(CompressorError):
    exit_status = 5


class ExportError(CompressorError):
    exit_status = 5


class VerificationError(CompressorError):
    exit_status = 5


class GateFailed(CompressorError):
    exit_status = 1


def suggestion(word: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {', '.join(names)}."
