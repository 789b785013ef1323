"""The best path through a bitshift trellis, exactly (Viterbi 1967; trellis codes of weights: QTIP, arXiv 2406.11235).

Of a sequence of vectors each step chooses a state; a state's lowest bits are the step's code, and what is above them
the lowest bits of the state before. The distances of a sequence are one matrix product; adding, comparing and
selecting are a compiled loop over it.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


def best_path(points: Tensor, weights: Tensor, codewords: Tensor, width: int, cost: Tensor | None = None) -> Tensor:
    """The states (steps,) int32 of least Σ_t weight_t·‖x_t − C_{s_t}‖² along a path.

    Args:
        points: (steps, dim) float32.
        weights: (steps,), not negative.
        codewords: (2**window, dim), of every state.
        width: Bits of a code, at most those of the window.
        cost: (steps, 2**window) float32 to work in, which need not be made anew for every sequence.

    Raises:
        ValueError: A point is not finite.
    """
    squares, weights = points.square().sum(1), weights / weights.mean().clamp_min(1e-30)
    left = torch.cat([points * (-2 * weights).unsqueeze(1), weights.unsqueeze(1), (weights * squares).unsqueeze(1)], 1)
    right = torch.cat([codewords, codewords.square().sum(1, keepdim=True), torch.ones(len(codewords), 1)], 1)
    if not bool(left.isfinite().all()):
        raise ValueError("points without a path through the trellis: they are not finite")
    cost = torch.mm(left, right.T) if cost is None else torch.mm(left, right.T, out=cost)
    return torch.from_numpy(_path(cost.numpy(), width))


@numba.njit(fastmath=True, nogil=True, error_model="numpy")
def _path(cost, width):  # pragma: no cover - compiled
    """Of costs (steps, states), which are added up in place."""
    n, n_states = cost.shape
    n_codes = 1 << width
    n_kept = n_states >> width  # what of a state the next one keeps
    best = np.empty(n_kept, np.float32)
    for t in range(1, n):
        last, here = cost[t - 1], cost[t]
        best[:] = last[:n_kept]
        for code in range(1, n_codes):
            part = last[code * n_kept : (code + 1) * n_kept]
            for kept in range(n_kept):
                best[kept] = min(best[kept], part[kept])
        for kept in range(n_kept):
            low = best[kept]
            part = here[kept * n_codes : (kept + 1) * n_codes]
            for code in range(n_codes):
                part[code] += low
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
