"""Work on what a stranger wrote, in a fork that may take so much time and memory and no more."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from compressor.core.machine import address_space

SECONDS, BYTES = 5, 500_000_000
"""Of a processor, and of memory beside what there is already."""
LONGEST = 10_000_000
"""Bytes of the text that comes back."""


class Exceeded(Exception):
    """It took too much, or ended."""


def bounded(work: Callable[[], str]) -> str:
    """The text that `work` gives, or ValueError with what it raised; in this process where none can be forked.

    Raises:
        Exceeded: It took more time, memory or letters than there are for it.
        ValueError: It failed.
    """
    if not hasattr(os, "fork"):
        return _tried(work)[1]
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        status = 2
        try:
            _limit()
            failed, text = _tried(work)
            with os.fdopen(writing, "wb") as file:
                file.write(text.encode("utf-8", "surrogatepass")[: LONGEST + 1])
            status = int(failed)
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        found = file.read(LONGEST + 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGXCPU:
        raise Exceeded(f"it took more than {SECONDS} s")
    if code not in (0, 1):
        raise Exceeded("it took more memory than there is for it")
    if len(found) > LONGEST:
        raise Exceeded(f"it made more than {LONGEST:,} bytes")
    text = found.decode("utf-8", "surrogatepass")
    if code:
        raise ValueError(text)
    return text


def _tried(work: Callable[[], str]) -> tuple[bool, str]:
    """(whether it failed, the text or why): whatever a stranger's work raises is only told."""
    try:
        return False, work()
    except MemoryError:
        raise
    except Exception as error:
        return True, f"{type(error).__name__}: {error}"


def _limit() -> None:
    import resource

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = address_space() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if before == resource.RLIM_INFINITY else min(before, wanted), most))
