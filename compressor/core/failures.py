"""Any error as an exit status and one line. Status 5 is for bugs of ours: what a system refuses is none."""

from __future__ import annotations

import errno

from compressor.core.errors import CompressorError
from compressor.core.machine import is_scarce
from compressor.core.resources import shortage
from compressor.core.terminal import printable

UNREADABLE, USAGE, RESOURCES, BUG, INTERRUPTED = 3, 2, 4, 5, 130
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL,
    errno.EXDEV, errno.ETXTBSY, errno.EBUSY,
)  # fmt: skip
_LOST = (errno.ENOENT, errno.ESTALE, errno.EBADF, errno.ENODEV, errno.ENXIO, errno.ENOTCONN)


def explain(error: BaseException) -> tuple[int, str]:
    """(exit status, message); the message is one line, and can be printed."""
    status, message = _explained(error)
    return status, printable(" ".join(message.split()))


def _explained(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, CompressorError) and error.exit_status == RESOURCES:
        return RESOURCES, str(error)
    if short := shortage(error):
        return RESOURCES, short
    if isinstance(error, CompressorError):
        return error.exit_status, str(error)
    if isinstance(error, OSError) and error.filename and error.errno in _REFUSED:
        return USAGE, f"{error.filename}: cannot be used; {error.strerror}; give another path, or change its rights"
    if isinstance(error, OSError) and error.filename and error.errno in _LOST:
        return UNREADABLE, f"{error.filename}: {error.strerror}; it was there before; leave it while a run reads it"
    if isinstance(error, SystemExit):
        return UNREADABLE, (
            f"code that was called for a network or for data ended the process, by exit({error.code!r}); "
            "let it return what was asked for"
        )
    if isinstance(error, ImportError):
        return RESOURCES, f"a library cannot be loaded; {error}; free some memory, or install the package again"
    if is_scarce():  # libraries swallow the error that it was, and fail over what is then missing
        return RESOURCES, f"memory is too little, most likely; found {type(error).__name__}: {error}; take more of it"
    return BUG, f"{type(error).__name__}: {error}; this is a bug of ours: please report it with the output of --debug"
