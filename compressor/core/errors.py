"""Every error that a user may meet, and the exit status that the command gives it.

CompressorError
├── UsageError          2   an option or an argument that cannot be
│   └── RecipeError     2   a recipe that cannot be run as written
├── CheckpointError     3   a model that cannot be read, or is refused
├── DataError           3   calibration or evaluation data that cannot be read, or overlaps
├── ChangedError        3   what a run reads or replaces changed while it went on
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


class ChangedError(CompressorError):
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


_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "Failed to allocate memory", "Cannot allocate memory")
"""What libraries say where Python would raise a MemoryError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that there was no memory left."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__ or error
    return False


def first_line(error: BaseException) -> str:
    """The first line of what an error says; of one that says nothing its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggestion(word: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {', '.join(names)}."
