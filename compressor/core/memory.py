"""Freed memory: kept for the next tensor while work goes on, returned to the system between its parts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Callable, Iterator

from compressor.core.machine import private_memory

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of mallopt."""
_KEPT = 512 << 20
"""Bytes at the heap's top that stay with the process."""
SLACK, LEARNING_SLACK = 100_000_000, 300 << 20
"""Bytes by which a sweep may grow by what is free before that goes back; and steps over the whole network, of
SmolLM2-135M what two or three blocks leave behind: with more a step is no faster by much."""


class _Allocated(ctypes.Structure):
    """What glibc's mallinfo2 says of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


@functools.cache
def _glibc(name: str) -> Callable[..., int]:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # no glibc
        return lambda *_: 0


@functools.cache
def _mallinfo() -> Callable[[], _Allocated] | None:
    try:
        found = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # no glibc, or one from before 2.33
        return None
    found.restype = _Allocated
    return found


def _in_use() -> int:
    """Bytes of the heap that somebody holds; 0 where the allocator does not tell."""
    ask = _mallinfo()
    if ask is None:
        return 0
    found = ask()
    return found.uordblks + found.hblkhd


@contextlib.contextmanager
def freed_is_kept() -> Iterator[None]:
    """Within it large tensors come from the heap, whose freed pages serve the next one.

    glibc maps each anew otherwise, and the system clears its pages: of elementwise work on large tensors that is most
    of the time. For the whole process, which is none of ours where somebody calls `compress()`: at the end glibc does
    again what it does by itself, and what was kept goes back. Of two at a time the first to end is the end of both.
    """
    _glibc("mallopt")(_MMAP_MAX, 0)
    _glibc("mallopt")(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        _glibc("mallopt")(_MMAP_MAX, _usual("MALLOC_MMAP_MAX_", 65536))
        _glibc("mallopt")(_TRIM_THRESHOLD, _usual("MALLOC_TRIM_THRESHOLD_", 128 << 10))
        gc.collect()
        give_back()


def _usual(variable: str, default: int) -> int:
    """What glibc was told by the environment, or its own value."""
    stated = os.environ.get(variable, "")
    return int(stated) if stated.isdecimal() else default


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Within it the garbage collector looks only at what has come since: what the libraries hold, a million objects,
    takes it a third of a second each time. What the host has frozen itself stays so."""
    frozen = gc.get_freeze_count()
    gc.collect()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps what it cannot merge, more with every block that has gone."""
    _glibc("malloc_trim")(0)


class Slack:
    """Gives freed memory back once the process has grown by `most` bytes since the last time, and has as many free.

    What goes back is cleared by the system before it serves again: of a block that runs for a second a fifth of that.
    Where the allocator does not tell what is in use, any growth is taken for free memory.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._note()

    def _note(self) -> None:
        self._after = private_memory() or 0
        self._apart = self._after - _in_use()

    def give_back(self) -> None:
        private = private_memory() or 0
        self._after = min(self._after, private)  # others have given back
        if private - self._after >= self._most and private - _in_use() - self._apart >= self._most:
            give_back()
            self._note()
