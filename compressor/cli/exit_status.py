"""Any error as an exit status and one line for the user."""

from __future__ import annotations

import errno
from typing import Any

from compressor.core.errors import CompressorError, is_out_of_memory

USAGE, RESOURCES, BUG, INTERRUPTED = 2, 4, 5, 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def explain(error: Exception) -> tuple[int, str]:
    """(exit status, message); the message is one line."""
    if isinstance(error, CompressorError):
        return error.exit_status, " ".join(str(error).split())
    if hasattr(error, "format_message"):  # typer's own: wrong usage
        return getattr(error, "exit_code", USAGE), _wrong_usage(error)
    if is_out_of_memory(error):
        return RESOURCES, "out of memory; lower calibration.tokens with --set, or take a machine with more"
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f"{error.filename}: " if error.filename else ""
        return RESOURCES, f"{where}{error.strerror}; make room and go on with --resume"
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return BUG, f"{message}; this is a bug of ours: please report it with the output of --debug"


def _wrong_usage(error: Any) -> str:
    return error.format_message().replace("Value error, ", "").rstrip(".") + ". See `compress --help`."
