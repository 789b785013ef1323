"""Whether an error came of too little memory, disk or handles, however a library words it: never the user's files.

Want of memory shows as MemoryError, as errors of torch, onnxruntime and Rust that only their texts tell apart, as a
thread or a process that cannot start, and as an import that fails half way. Readers that take many kinds of error for
damage ask here first.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from compressor.core.errors import CompressorError, ResourceError

MEMORY, DISK, HANDLES, PROCESSES = "memory", "disk", "file handles", "processes"
_BY_NUMBER = {
    errno.ENOMEM: MEMORY, errno.ENOSPC: DISK, errno.EDQUOT: DISK, errno.EFBIG: DISK, errno.EIO: DISK,
    errno.EMFILE: HANDLES, errno.ENFILE: HANDLES, errno.EAGAIN: PROCESSES,
}  # fmt: skip
_BY_TEXT = {
    MEMORY: re.compile(
        r"can(?:'|no)t allocate memory|not enough memory|bad[_ ]alloc|[Ff]ailed to allocate|[Oo]ut of memory"
        r"|failed to map segment|Available memory of \d+ is smaller|ran out of memory|os error 12\b|memory exhausted"
        r"|\bMemoryError\b|[Cc]ould not allocate|[Uu]nable to (?:m?map|allocate)\b"
    ),
    DISK: re.compile(r"No space left on|Disk quota exceeded|failed writing file|unexpected pos \d+ vs|os error 28\b"),
    HANDLES: re.compile(r"Too many open files|os error 24\b"),
    PROCESSES: re.compile(
        r"can't start new thread|Resource temporarily unavailable|pthread_create failed|[Tt]hread creation failed"
    ),
}
_ADVICE = {
    MEMORY: "take a machine with more, lower calibration.tokens with --set, or see --dry-run for what a run needs",
    DISK: "make room and go on with --resume",
    HANDLES: "raise the limit with `ulimit -n` and go on with --resume",
    PROCESSES: "raise the limit with `ulimit -u`, or free some memory, and go on with --resume",
}


def ran_out(error: BaseException | None) -> str:
    """What there was too little of, where that is the reason for an error or behind it; empty where it is not."""
    for each in _chain(error):
        if isinstance(each, MemoryError):
            return MEMORY
        if isinstance(each, OSError) and each.errno in _BY_NUMBER:
            return _BY_NUMBER[each.errno]
        if not isinstance(each, CompressorError):  # whose words may be a stranger's
            found = said(str(each))
            if found:
                return found
    return ""


def said(text: str) -> str:
    """What a library's message says that there was too little of."""
    return next((what for what, pattern in _BY_TEXT.items() if pattern.search(text)), "")


def shortage(error: BaseException) -> str:
    """The sentence on what ran out, with the place where it is known; empty where nothing did."""
    what = ran_out(error)
    if not what:
        return ""
    named = next((each for each in _chain(error) if isinstance(each, OSError) and each.filename), None)
    where = f"{named.filename}: " if named is not None else ""
    verb = "are too few" if what in (HANDLES, PROCESSES) else "is too little"
    return f"{where}{what} {verb}; found {_first_line(error)!r}; {_ADVICE[what]}"


def refuse_shortage(error: BaseException) -> None:
    """Of an error that would be taken for damage: says instead that something ran out, where that is so.

    Raises:
        ResourceError: Memory, disk or handles were too few.
    """
    if isinstance(error, ResourceError):
        raise error
    found = shortage(error)
    if found:
        raise ResourceError(found) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(error: BaseException) -> str:
    found = [each for each in _chain(error) if not isinstance(each, CompressorError)]
    text = str(found[-1] if found else error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
