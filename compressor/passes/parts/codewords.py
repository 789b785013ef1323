"""What passes share that store codewords on the int4 grid times the scales of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.core.encoding import Scales
from compressor.ops.vector_descent import best_scales, decoded, row_losses

GRID_LOW, GRID_HIGH = -8, 7


def snap(codewords: Tensor, resolution: float) -> Tensor:
    """Codewords (…, K, dim) in units of the group's rms, to the int4 grid at `resolution` steps per rms."""
    return (codewords * resolution).round().clamp(GRID_LOW, GRID_HIGH)


def group_scales(weight: Tensor, group: int, resolution: float) -> Tensor:
    """Scales (rows, n_groups): rms/resolution, more where the group's largest weight would leave the grid.

    The rms is of what is not zero.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).view(rows, -1, group)
    rms = (padded.pow(2).sum(2) / (padded != 0).sum(2).clamp_min(1)).sqrt()
    return torch.maximum(rms / resolution, padded.abs().amax(2) / (GRID_HIGH + 1.5)).clamp_min(1e-7)


def in_whole_groups(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns), float32, and its hessian (columns, columns), zero where columns fill up a group."""
    padding = -weight.shape[1] % group
    weight = weight.float()
    if padding:  # pad copies even by nothing, and Hessians are large
        weight = torch.nn.functional.pad(weight, (0, padding))
        hessian = torch.nn.functional.pad(hessian, (0, padding, 0, padding))
    return weight, hessian


def rescaled(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Scales, codewords: Tensor, scale_bits: int
) -> Scales:
    """The best scales for codes (rows, columns / dim) as they are stored; a row's old ones where rounding loses what
    they gain."""
    old = scales.decode()
    new = Scales.of(best_scales(weight, hessian, codes, old, codewords).clamp_min(1e-7), scale_bits)
    before, after = (row_losses(weight, hessian, decoded(codes, s, codewords)) for s in (old, new.decode()))
    worse = (after >= before).unsqueeze(1)
    row = None if scales.row is None or new.row is None else torch.where(worse, scales.row, new.row)
    return Scales(torch.where(worse, scales.values, new.values), row)
