"""Loops over single numbers in machine code: numba's, and how they are run over the rows of matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_LEAST_ROWS = 64
"""Fewer of them are not worth another thread."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in machine code, kept beside its file or in the user's cache, where one can be written.

    Sums may be made in any order. A loop becomes one over vectors where each index is a loop's own, one for each axis.
    """
    options = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "nogil": True, "error_model": "numpy"}
    try:
        found = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)
    if cache := getattr(found, "_cache", None):  # none where numba is told to compile nothing
        for name in ("load_overload", "save_overload"):
            setattr(cache, name, _or_none(getattr(cache, name), cache.flush))
    return found


def _or_none(use: Callable[..., Any], empty: Callable[[], None]) -> Callable[..., Any]:
    """A use of numba's cache; where that is broken off, full, or no longer to be written, there is none."""

    def used(*args: Any) -> Any:
        try:
            return use(*args)
        except MemoryError:
            raise
        except Exception:  # what a pickle that is cut off comes to
            with contextlib.suppress(Exception):
                empty()
            return None

    return used


def on_host(*tensors: Tensor) -> list[np.ndarray]:
    """Arrays for compiled loops, which run on the processor wherever tensors lie; copies where they must be."""
    return [tensor.detach().cpu().contiguous().numpy() for tensor in tensors]


def over_rows(n_rows: int, work: Callable[[slice], None]) -> None:
    """Does the work for all rows, as many of them at a time as torch has threads; they know nothing of one another."""
    threads = max(1, min(torch.get_num_threads(), n_rows // _LEAST_ROWS))
    if threads == 1:
        work(slice(0, n_rows))
        return
    at_once = -(-n_rows // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, (slice(begin, begin + at_once) for begin in range(0, n_rows, at_once))))
