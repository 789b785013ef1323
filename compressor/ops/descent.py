"""Coordinate descent on a quadratic loss of a matrix whose values lie on a grid.

L(Ŵ) = tr(ŴHŴᵀ) − 2·tr(PŴᵀ): with all other columns fixed, column j is best at ŵ_j − E_j/H_jj, E = ŴH − P, and on the
grid at the point nearest to that; every move lowers the loss (QuantEase, Behdin et al., arXiv 2309.01885, algorithm 1).
Scales of groups likewise: with d the values of a group without their scale, s − ⟨E_g, d⟩/(dᵀ·H_gg·d).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from compressor.ops.compiled import compiled, over_rows
from compressor.ops.uniform import Fitted, nearest_stored

_COLUMNS = 64


def descend(
    start: Fitted, hessian: Tensor, pull: Tensor, sweeps: int, mask: Tensor | None = None, scale_bits: int | None = None
) -> Fitted:  # fmt: skip
    """`start` with codes, and with `scale_bits` also scales, after `sweeps` over all columns.

    Hessian H (columns, columns) and P (rows, columns), padded as the start is. Where `mask` (rows, columns) is False
    the value stays 0. Inputs that are always zero leave their column alone.
    """
    scale, zero = start.scale.clone(), start.zero
    group, n_columns = start.group, start.due.shape[1]
    wide = zero.repeat_interleave(group, 1)
    offset = (
        start.nearest((start.due.view(*scale.shape, -1) / scale.unsqueeze(2) + zero.unsqueeze(2)).flatten(1)) - wide
    )
    if mask is not None:
        offset = offset * mask
    error = (offset * scale.repeat_interleave(group, 1)) @ hessian - pull
    levels = torch.empty(0) if start.levels is None else start.levels.float()
    kept = np.ones((0, 0), np.bool_) if mask is None else mask.contiguous().numpy()
    steps = (start.top.float().squeeze(1) / 255).numpy()
    whole = offset.numpy(), error.numpy(), scale.numpy(), zero.float().contiguous().numpy()
    block = group * max(1, _COLUMNS // group)
    for begin in (begin for _ in range(sweeps) for begin in range(0, n_columns, block)):
        here = slice(begin, min(begin + block, n_columns))
        moved = torch.empty(len(offset), here.stop - begin)
        how = hessian[here, here].contiguous().numpy(), kept, levels.numpy(), start.n_levels, steps, scale_bits or 0

        def visit(rows: slice, begin: int = begin, moved: Tensor = moved, how: tuple = how) -> None:
            _visit(*whole, moved.numpy(), *how, begin, rows.start, rows.stop)

        over_rows(len(offset), visit)
        error.addmm_(moved, hessian[here])
    values = offset + wide
    due = (offset.view(*scale.shape, -1) * scale.unsqueeze(2)).flatten(1)
    return dataclasses.replace(start, codes=start.code_of(values), due=due, scale=scale)


@compiled
def _visit(
    offset, error, scales, zeros, moved, inner, kept, levels, n_levels, steps, scale_bits, begin, first, last
):  # pragma: no cover - compiled  # fmt: skip
    """Each column of a block once, then with `scale_bits` the scale of each of its groups, in rows first … last.

    Changes offset, codes less zeros, and scales; fills `moved` with what the values changed by.
    """
    n_columns = moved.shape[1]
    size = offset.shape[1] // scales.shape[1]
    top, none, least = np.float32(n_levels - 1), np.float32(0), np.float32(1e-30)
    nearby, pulled = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)
    for row in range(first, last):
        for k in range(n_columns):
            nearby[k] = error[row, begin + k]
            moved[row, k] = -offset[row, begin + k] * scales[row, (begin + k) // size]
        for j in range(n_columns):
            column = begin + j
            if inner[j, j] <= 0 or (column < kept.shape[1] and not kept[row, column]):
                continue
            scale, zero, before = scales[row, column // size], zeros[row, column // size], offset[row, column]
            position = (before * scale - nearby[j] / inner[j, j]) / scale + zero
            after = _nearest(position, levels, top) - zero
            if after != before:
                offset[row, column] = after
                change = (after - before) * scale
                for k in range(n_columns):
                    nearby[k] += change * inner[j, k]
        for start in range(0, n_columns if scale_bits else 0, size):
            at = (begin + start) // size
            for k in range(n_columns):
                pulled[k] = none
            for j in range(start, start + size):
                value = offset[row, begin + j]
                for k in range(n_columns):
                    pulled[k] += value * inner[j, k]
            slope, bend = none, least
            for j in range(start, start + size):
                slope += nearby[j] * offset[row, begin + j]
                bend += pulled[j] * offset[row, begin + j]
            scale = scales[row, at]
            wanted = scale - slope / bend
            if not wanted * scale > 0:  # of the other sign, or no number
                continue
            change = nearest_stored(wanted, steps[row], scale_bits) - scale
            if 2 * change * slope + change * change * bend < 0:
                scales[row, at] = scale + change
                for k in range(n_columns):
                    nearby[k] += change * pulled[k]
        for k in range(n_columns):
            moved[row, k] += offset[row, begin + k] * scales[row, (begin + k) // size]


@compiled
def _nearest(position, levels, top):  # pragma: no cover - compiled
    """The level nearest to a position: of 0 … top where no levels are given; halfway between two of these the upper."""
    if not len(levels):
        return min(max(np.rint(position), np.float32(0)), top)
    found = levels[0]
    for k in range(1, len(levels)):
        if position >= (levels[k - 1] + levels[k]) / 2:
            found = levels[k]
    return found
