"""Any error of a command as an exit status and one line for the user."""

from __future__ import annotations

from typing import Any

from compressor.core.failures import INTERRUPTED, USAGE, explain
from compressor.core.terminal import printable

__all__ = ["INTERRUPTED", "explained"]


def explained(error: BaseException) -> tuple[int, str]:
    """(exit status, message) of an error, or of wrong usage as typer words it."""
    if hasattr(error, "format_message"):
        return getattr(error, "exit_code", USAGE), printable(" ".join(_wrong_usage(error).split()))
    return explain(error)


def _wrong_usage(error: Any) -> str:
    return error.format_message().replace("Value error, ", "").rstrip(".") + ". See `compress --help`."
