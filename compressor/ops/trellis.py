"""The best path through a bitshift trellis, exactly (Viterbi 1967; trellis codes of weights: QTIP, arXiv 2406.11235).

Of a sequence of pairs each step chooses a state; a state's lowest bits are the step's code, and what is above them the
lowest bits of the state before. Distances, adding, comparing and selecting are one compiled loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_LARGE = np.float32(1e38)
"""The cost of a state that there is not: four codes are compared at a time, and there may be two."""


def best_path(points: Tensor, weights: Tensor, codewords: Tensor, width: int) -> Tensor:
    """The states (steps,) int32 of least Σ_t weight_t·‖x_t − C_{s_t}‖² along a path.

    Args:
        points: (steps, 2) float32.
        weights: (steps,), not negative.
        codewords: (2**window, 2), of every state.
        width: Bits of a code, fewer than those of the window.

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
    return torch.from_numpy(_path(factors.cpu().numpy(), terms.cpu().numpy(), width)).to(points.device)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in machine code, kept beside this file or in the user's cache, where one can be written."""
    options = {"fastmath": True, "nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


@_compiled
def _least(costs, least):  # pragma: no cover - compiled
    """The least of the costs (codes / 4, 4, kept) of all states that end in the same bits, for each of these."""
    runs, _, n_kept = costs.shape
    for kept in range(n_kept):
        least[kept] = min(min(costs[0, 0, kept], costs[0, 1, kept]), min(costs[0, 2, kept], costs[0, 3, kept]))
    for run in range(1, runs):
        for kept in range(n_kept):
            low = min(min(costs[run, 0, kept], costs[run, 1, kept]), min(costs[run, 2, kept], costs[run, 3, kept]))
            least[kept] = min(least[kept], low)


@_compiled
def _add(costs, least, first, second, square, a, b, c, d):  # pragma: no cover - compiled
    """Costs (kept, codes) of a step's states: the distance of each on top of the least on the way to it."""
    n_kept, n_codes = costs.shape
    for kept in range(n_kept):
        low = least[kept] + d
        for code in range(n_codes):
            costs[kept, code] = low + (a * first[kept, code] + b * second[kept, code] + c * square[kept, code])


@_compiled
def _path(factors, terms, width):  # pragma: no cover - compiled
    """The states of least cost; `factors` (steps, 4) times `terms` (3, states), and one, are the distances.

    Of each step what stays is the least cost for each of the bits that the next state keeps: the costs of all states
    are made again for the few that the path can come from. Indices are of loops alone, one for each axis: numba proves
    such ones to lie within, and only then does a loop become one over vectors.
    """
    n, n_states = len(factors), terms.shape[1]
    n_codes = 1 << width
    n_kept = n_states >> width  # what of a state the next one keeps
    first = terms[0].reshape(n_kept, n_codes)
    second = terms[1].reshape(n_kept, n_codes)
    square = terms[2].reshape(n_kept, n_codes)
    costs = np.full(max(n_states, 4 * n_kept), _LARGE, np.float32)
    before, after = costs.reshape(-1, 4, n_kept), costs[:n_states].reshape(n_kept, n_codes)
    least = np.zeros((n, n_kept), np.float32)
    for t in range(n):
        if t:
            _least(before, least[t])
        _add(after, least[t], first, second, square, factors[t, 0], factors[t, 1], factors[t, 2], factors[t, 3])
    states = np.empty(n, np.int32)
    state = np.argmin(costs)
    states[n - 1] = state
    for t in range(n - 2, -1, -1):
        a, b, c = factors[t, 0], factors[t, 1], factors[t, 2]
        kept, low = state >> width, _LARGE
        state = kept
        for code in range(n_codes):
            at = code * n_kept + kept
            here = least[t, at >> width] + (a * terms[0, at] + b * terms[1, at] + c * terms[2, at])
            if here < low:
                state, low = at, here
        states[t] = state
    return states
