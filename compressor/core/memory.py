"""Freed memory: kept for the next tensor while work goes on, returned to the system between its parts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of mallopt."""
_KEPT = 512 << 20
"""Bytes at the heap's top that stay with the process."""


@functools.cache
def _glibc(name: str) -> Callable[..., int]:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # no glibc
        return lambda *_: 0


def keep_freed() -> None:
    """Lets large tensors come from the heap, whose freed pages serve the next one.

    glibc maps each anew otherwise, and the system clears its pages: of elementwise work on large tensors that is most
    of the time. For the whole process.
    """
    _glibc("mallopt")(_MMAP_MAX, 0)
    _glibc("mallopt")(_TRIM_THRESHOLD, _KEPT)


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Within it the garbage collector looks only at what has come since: what the libraries hold, a million objects,
    takes it a third of a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps what it cannot merge, more with every block that has gone."""
    _glibc("malloc_trim")(0)
