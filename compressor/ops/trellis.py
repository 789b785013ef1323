"""The best path through a bitshift trellis, exactly (Viterbi 1967; trellis codes of weights: QTIP, arXiv 2406.11235).

Of a sequence of pairs each step chooses a state; a state's lowest bits are the step's code, and what is above them the
lowest bits of the state before. Distances, adding, comparing and selecting are one compiled loop.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor


def best_path(points: Tensor, weights: Tensor, codewords: Tensor, width: int, cost: Tensor | None = None) -> Tensor:
    """The states (steps,) int32 of least Σ_t weight_t·‖x_t − C_{s_t}‖² along a path.

    Args:
        points: (steps, 2) float32.
        weights: (steps,), not negative.
        codewords: (2**window, 2), of every state.
        width: Bits of a code, at most those of the window.
        cost: (steps, 2**window) float32 to work in, which need not be made anew for every sequence.

    Raises:
        ValueError: A point is not finite.
    """
    squares, weights = points.square().sum(1), weights / weights.mean().clamp_min(1e-30)
    factors = torch.cat(
        [points * (-2 * weights).unsqueeze(1), weights.unsqueeze(1), (weights * squares).unsqueeze(1)], 1
    )
    if not bool(factors.isfinite().all()):
        raise ValueError("points without a path through the trellis: they are not finite")
    terms = torch.cat([codewords, codewords.square().sum(1, keepdim=True)], 1).T.contiguous()
    cost = torch.empty(len(points), len(codewords)) if cost is None else cost
    return torch.from_numpy(_path(factors.numpy(), terms.numpy(), width, cost.numpy()))


def _compiled(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The function in machine code, kept beside this file or in the user's cache, where one can be written."""
    options = {"fastmath": True, "nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


@_compiled
def _path(factors, terms, width, cost):  # pragma: no cover - compiled
    """The states of least cost; `factors` (steps, 4) times `terms` (3, states), and one, are the distances."""
    n, n_states = cost.shape
    n_codes = 1 << width
    n_kept = n_states >> width  # what of a state the next one keeps
    best = np.zeros(n_kept, np.float32)
    first, second, square = terms[0], terms[1], terms[2]
    for t in range(n):
        here = cost[t]
        if t:
            last = cost[t - 1]
            best[:] = last[:n_kept]
            for code in range(1, n_codes):
                part = last[code * n_kept : (code + 1) * n_kept]
                for kept in range(n_kept):
                    best[kept] = min(best[kept], part[kept])
        a, b, c, d = factors[t, 0], factors[t, 1], factors[t, 2], factors[t, 3]
        for kept in range(n_kept):
            low, begin, end = best[kept] + d, kept * n_codes, (kept + 1) * n_codes
            part, x, y, z = here[begin:end], first[begin:end], second[begin:end], square[begin:end]
            for code in range(n_codes):
                part[code] = low + a * x[code] + b * y[code] + c * z[code]
    states = np.empty(n, np.int32)
    state = np.argmin(cost[n - 1])
    states[n - 1] = state
    for t in range(n - 2, -1, -1):
        kept = state >> width
        state, low = kept, cost[t, kept]
        for code in range(1, n_codes):
            at = code * n_kept + kept
            if cost[t, at] < low:
                state, low = at, cost[t, at]
        states[t] = state
    return states
