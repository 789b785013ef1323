"""Coordinate descent on a quadratic loss of a matrix whose values lie on a grid.

L(Ŵ) = tr(ŴHŴᵀ) − 2·tr(PŴᵀ): with all other columns fixed, column j is best at ŵ_j − E_j/H_jj, E = ŴH − P, and on the
grid at the point nearest to that; every move lowers the loss (QuantEase, Behdin et al., arXiv 2309.01885, algorithm 1).
Scales of groups likewise: with d the values of a group without their scale, s − ⟨E_g, d⟩/(dᵀ·H_gg·d).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.ops.compiled import compiled, on_host, over_rows
from compressor.ops.error_feedback import BUFFER
from compressor.ops.uniform import Fitted, nearest_stored


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
    levels, steps = on_host(
        torch.empty(0) if start.levels is None else start.levels.float(), start.top.float().squeeze(1) / 255
    )
    how = levels, start.n_levels, steps, scale_bits or 0
    block = group * max(1, BUFFER // group)
    for begin in (begin for _ in range(sweeps) for begin in range(0, n_columns, block)):
        here = slice(begin, min(begin + block, n_columns))
        at = slice(begin // group, here.stop // group)
        kept = torch.ones(0, 0, dtype=torch.bool) if mask is None else mask[:, here]
        given = on_host(error[:, here], hessian[here, here], zero[:, at].float(), kept)
        changed = [each.cpu().clone() for each in (offset[:, here], scale[:, at])]
        moved = torch.empty(changed[0].shape)
        _visit_rows(*given, *(each.numpy() for each in (*changed, moved)), *how)
        offset[:, here], scale[:, at] = (each.to(offset.device) for each in changed)
        error.addmm_(moved.to(offset.device), hessian[here])
    values = offset + wide
    due = (offset.view(*scale.shape, -1) * scale.unsqueeze(2)).flatten(1)
    return dataclasses.replace(start, codes=start.code_of(values), due=due, scale=scale)


def _visit_rows(*given: Any) -> None:
    over_rows(len(given[0]), lambda rows: _visit(*given, rows.start, rows.stop))


@compiled
def _visit(
    error, inner, zeros, kept, offset, scales, moved, levels, n_levels, steps, scale_bits, first, last
):  # pragma: no cover - compiled  # fmt: skip
    """Each column of a block once, then with `scale_bits` the scale of each of its groups, in rows first … last.

    Changes offset, codes less zeros, and scales; fills `moved` with what the values changed by.
    """
    n_columns = moved.shape[1]
    size = n_columns // scales.shape[1]
    top, none, least = np.float32(n_levels - 1), np.float32(0), np.float32(1e-30)
    nearby, pulled = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)
    for row in range(first, last):
        for k in range(n_columns):
            nearby[k] = error[row, k]
            moved[row, k] = -offset[row, k] * scales[row, k // size]
        for j in range(n_columns):
            if inner[j, j] <= 0 or (len(kept) and not kept[row, j]):
                continue
            scale, zero, before = scales[row, j // size], zeros[row, j // size], offset[row, j]
            position = (before * scale - nearby[j] / inner[j, j]) / scale + zero
            after = _nearest(position, levels, top) - zero
            if after != before:
                offset[row, j] = after
                change = (after - before) * scale
                for k in range(n_columns):
                    nearby[k] += change * inner[j, k]
        for start in range(0, n_columns if scale_bits else 0, size):
            for k in range(n_columns):
                pulled[k] = none
            for j in range(start, start + size):
                value = offset[row, j]
                for k in range(n_columns):
                    pulled[k] += value * inner[j, k]
            slope, bend = none, least
            for j in range(start, start + size):
                slope += nearby[j] * offset[row, j]
                bend += pulled[j] * offset[row, j]
            scale = scales[row, start // size]
            wanted = scale - slope / bend
            if not wanted * scale > 0:  # of the other sign, or no number
                continue
            change = nearest_stored(wanted, steps[row], scale_bits) - scale
            if 2 * change * slope + change * change * bend < 0:
                scales[row, start // size] = scale + change
                for k in range(n_columns):
                    nearby[k] += change * pulled[k]
        for k in range(n_columns):
            moved[row, k] += offset[row, k] * scales[row, k // size]


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
