"""Coordinate descent on a quadratic loss of a matrix whose values lie on a grid.

L(Ŵ) = tr(ŴHŴᵀ) − 2·tr(PŴᵀ): with all other columns fixed, column j is best at ŵ_j − E_j/H_jj, E = ŴH − P, and on the
grid at the point nearest to that; every move lowers the loss (QuantEase, Behdin et al., arXiv 2309.01885, algorithm 1).
Scales of groups likewise: with d the values of a group without their scale, s − ⟨E_g, d⟩/(dᵀ·H_gg·d).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from compressor.ops.uniform import Fitted, stored_scale

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
    curvature = hessian.diagonal()
    error = (offset * scale.repeat_interleave(group, 1)) @ hessian - pull
    step = group * max(1, _COLUMNS // group)
    for _ in range(sweeps):
        for begin in range(0, n_columns, step):
            here = slice(begin, min(begin + step, n_columns))
            moved = offset[:, here] * scale.repeat_interleave(group, 1)[:, here]
            nearby, inner = error[:, here].clone(), hessian[here, here]
            for j in range(here.stop - begin):
                if curvature[begin + j] <= 0:
                    continue
                at = (begin + j) // group
                s, z = scale[:, at], zero[:, at]
                before = offset[:, begin + j] * s
                position = (before - nearby[:, j] / curvature[begin + j]) / s + z
                chosen = start.nearest(position) - z
                if mask is not None:
                    chosen = chosen * mask[:, begin + j]
                offset[:, begin + j] = chosen
                nearby.addr_(chosen * s - before, inner[j])
            if scale_bits is not None:
                _rescale(offset, scale, nearby, hessian, here, group, start.top, scale_bits)
            moved = offset[:, here] * scale.repeat_interleave(group, 1)[:, here] - moved
            error.addmm_(moved, hessian[here])
    values = offset + wide
    due = (offset.view(*scale.shape, -1) * scale.unsqueeze(2)).flatten(1)
    return dataclasses.replace(start, codes=start.code_of(values), due=due, scale=scale)


def _rescale(
    offset: Tensor, scale: Tensor, nearby: Tensor, hessian: Tensor, here: slice, group: int, top: Tensor, bits: int
) -> None:
    """The best stored scale of each group in turn, where it lowers the loss; changes `scale` and `nearby`."""
    for begin in range(here.start, here.stop, group):
        inside = slice(begin, begin + group)
        local = slice(begin - here.start, begin - here.start + group)
        values, at = offset[:, inside], begin // group
        slope = (nearby[:, local] * values).sum(1)
        bend = ((values @ hessian[inside, inside]) * values).sum(1).clamp_min(1e-30)
        wanted = torch.where((slope / bend).isfinite(), scale[:, at] - slope / bend, scale[:, at])
        wanted = torch.where(wanted * scale[:, at] > 0, wanted, scale[:, at])
        change = stored_scale(wanted.unsqueeze(1), top, bits).squeeze(1) - scale[:, at]
        change = torch.where(2 * change * slope + change**2 * bend < 0, change, 0.0)
        scale[:, at] += change
        nearby += (values * change.unsqueeze(1)) @ hessian[inside, here]
