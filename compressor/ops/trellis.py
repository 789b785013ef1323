"""The best path through a bitshift trellis, exactly (Viterbi 1967; trellis codes of weights: QTIP, arXiv 2406.11235).

Of a sequence of pairs each step chooses a state; a state's lowest bits are the step's code, and what is above them the
lowest bits of the state before. Distances, adding, comparing and selecting are one compiled loop.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compressor.ops.compiled import compiled, on_host

_NOT_FINITE = "points without a path through the trellis: they are not finite"
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
    if not math.isfinite(float(points.sum()) + float(weights.sum())):
        raise ValueError(_NOT_FINITE)
    return torch.from_numpy(_path(*on_host(points.float(), weights.float(), codewords.float()), width)).to(
        points.device
    )


def feed_path(
    current: Tensor, local: Tensor, scales: Tensor, table: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Error feedback within a block of columns, two of them at a time by the best path down all rows.

    Args:
        current: (rows, columns), what is due; may be changed.
        local: (columns, columns), the block's part of `inverse_factor`.
        scales: (rows, columns / 2), of each pair of columns.
        table: (2**window, 2).

    Returns:
        Values and errors as of `feed_forward`'s visit, and the states (rows, columns / 2) int32.

    Raises:
        ValueError: What is due is not finite.
    """
    due = current.cpu()
    values, errors = torch.empty_like(due), torch.empty_like(due)
    states = torch.empty(len(due), due.shape[1] // 2, dtype=torch.int32)
    found = values, errors, states
    _feed(due.numpy(), *on_host(local, scales, table), width, *(each.numpy() for each in found))
    if not math.isfinite(float(errors.sum())):
        raise ValueError(_NOT_FINITE)
    return values.to(current.device), errors.to(current.device), states.to(current.device)


@compiled
def _feed(current, local, scales, table, width, values, errors, states):  # pragma: no cover - compiled
    """For `feed_path`: the metric of a pair of columns is (x/p, (y − x·q/p)/r), with [[p, q], [0, r]] of the factor."""
    n_rows, n_columns = current.shape
    points, turned = np.empty((n_rows, 2), np.float32), np.empty_like(table)
    weights = np.empty(n_rows, np.float32)
    for j in range(0, n_columns, 2):
        p, q, r = local[j, j], local[j, j + 1], local[j + 1, j + 1]
        for row in range(n_rows):
            scale = scales[row, j // 2]
            points[row, 0] = current[row, j] / scale / p
            points[row, 1] = (current[row, j + 1] / scale - points[row, 0] * q) / r
            weights[row] = scale * scale
        for state in range(len(table)):
            turned[state, 0] = table[state, 0] / p
            turned[state, 1] = (table[state, 1] - turned[state, 0] * q) / r
        found = _path(points, weights, turned, width)
        for row in range(n_rows):
            state, scale = found[row], scales[row, j // 2]
            states[row, j // 2] = state
            first, second = table[state, 0] * scale, table[state, 1] * scale
            values[row, j], values[row, j + 1] = first, second
            one = (current[row, j] - first) / p
            two = (current[row, j + 1] - second - one * q) / r
            errors[row, j], errors[row, j + 1] = one, two
            for k in range(n_columns):
                current[row, k] -= one * local[j, k] + two * local[j + 1, k]


@compiled
def _least(costs, least):  # pragma: no cover - compiled
    """The least of the costs (codes / 4, 4, kept) of all states that end in the same bits, for each of these."""
    runs, _, n_kept = costs.shape
    for kept in range(n_kept):
        least[kept] = min(min(costs[0, 0, kept], costs[0, 1, kept]), min(costs[0, 2, kept], costs[0, 3, kept]))
    for run in range(1, runs):
        for kept in range(n_kept):
            low = min(min(costs[run, 0, kept], costs[run, 1, kept]), min(costs[run, 2, kept], costs[run, 3, kept]))
            least[kept] = min(least[kept], low)


@compiled
def _add(costs, least, first, second, square, a, b, c, d):  # pragma: no cover - compiled
    """Costs (kept, codes) of a step's states: the distance of each on top of the least on the way to it."""
    n_kept, n_codes = costs.shape
    for kept in range(n_kept):
        low = least[kept] + d
        for code in range(n_codes):
            costs[kept, code] = low + (a * first[kept, code] + b * second[kept, code] + c * square[kept, code])


@compiled
def _path(points, weights, words, width):  # pragma: no cover - compiled
    """The states of least cost, for `best_path`.

    Of each step what stays is the least cost for each of the bits that the next state keeps: the costs of all states
    are made again for the few that the path can come from. Indices are of loops alone, one for each axis: numba proves
    such ones to lie within, and only then does a loop become one over vectors.
    """
    n, n_states = len(points), len(words)
    n_codes = 1 << width
    n_kept = n_states >> width  # what of a state the next one keeps
    terms = np.empty((3, n_states), np.float32)
    for state in range(n_states):
        x, y = words[state, 0], words[state, 1]
        terms[0, state], terms[1, state], terms[2, state] = x, y, x * x + y * y
    first = terms[0].reshape(n_kept, n_codes)
    second = terms[1].reshape(n_kept, n_codes)
    square = terms[2].reshape(n_kept, n_codes)
    total = np.float32(0)
    for t in range(n):
        total += weights[t]
    share = np.float32(n) / max(total, np.float32(1e-30))  # costs are of weights whose mean is 1
    factors = np.empty((n, 3), np.float32)
    costs = np.full(max(n_states, 4 * n_kept), _LARGE, np.float32)
    before, after = costs.reshape(-1, 4, n_kept), costs[:n_states].reshape(n_kept, n_codes)
    least = np.zeros((n, n_kept), np.float32)
    for t in range(n):
        x, y, c = points[t, 0], points[t, 1], weights[t] * share
        a, b = np.float32(-2) * c * x, np.float32(-2) * c * y
        factors[t, 0], factors[t, 1], factors[t, 2] = a, b, c
        if t:
            _least(before, least[t])
        _add(after, least[t], first, second, square, a, b, c, c * (x * x + y * y))
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
