"""Uniform grids per group of columns: the scale, and the zero point, that lose least.

ŵ = s·(clip(round(w/s + z), 0, 2**b − 1) − z). Scales come from a search over shrink factors, as in GPTQ's and
llama.cpp's quantisers; errors may be weighted per column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.ops.widths import zero_steps


def code(values: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """q = clip(round(w/s + z), 0, 2**bits − 1), float; all broadcast together. Ties round to even."""
    return (values / scale + zero).round().clamp(0, 2**bits - 1)


def nearest_zero(point: Tensor, bits: int, zero: str) -> Tensor:
    """The zero points nearest to `point` that are stored: whole ones, or "fine" ones, of 8 bits over the codes' range.

    >>> nearest_zero(torch.tensor([7.4, 20.0]), 4, "learned"), nearest_zero(torch.tensor([7.4, 20.0]), 4, "fine")
    (tensor([ 7., 15.]), tensor([ 7.3750, 15.9375]))
    """
    steps = zero_steps(zero, bits)
    return (point * steps).round().clamp(0, 2**bits * steps - 1) / steps


def search_scale(
    groups: Tensor, bits: int, zero: str, weights: Tensor | float = 1.0, n_steps: int = 20, signed: bool = True
) -> tuple[Tensor, Tensor]:
    """Scale and zero (…, 1) of groups (…, size) with the least Σ weight·(w − ŵ)².

    `zero`: "middle" (z = 2**(bits−1), the scale's sign free if `signed`), "half" (z = that − ½), "learned" (an
    integer from the group's range) or "fine" (that, of 8 bits). An all-zero group gets the least positive scale.
    """
    tries = _tries(groups, bits, zero, weights, n_steps, signed)
    best_scale, best_zero, best = next(tries)
    for scale, point, error in tries:
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, point, best_zero)
    return best_scale, best_zero


def _tries(
    groups: Tensor, bits: int, zero: str, weights: Tensor | float, n_steps: int, signed: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Scales, zeros and what is lost by them, from the range of each group down to a share of it."""
    tiny = torch.finfo(torch.float16).tiny
    top = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    extreme = torch.where(-low >= high, -low, -high)
    for shrink in torch.linspace(1.0, 0.35 if bits > 2 else 0.2, n_steps):
        if zero in ("learned", "fine"):
            scale = ((high - low) * shrink / top).clamp_min(tiny)
            point = nearest_zero(-low * shrink / scale, bits, zero)
        elif zero == "half":
            scale = (extreme.abs() * shrink / (top / 2)).clamp_min(tiny)
            point = torch.full_like(scale, top / 2)
        else:
            scale = extreme * shrink / 2 ** (bits - 1) if signed else extreme.abs() * shrink / (2 ** (bits - 1) - 0.5)
            scale = torch.where(scale.abs() < tiny, tiny, scale)
            point = torch.full_like(scale, 2.0 ** (bits - 1))
        error = weights * ((code(groups, scale, point, bits) - point) * scale - groups) ** 2
        yield scale, point, error.sum(-1, keepdim=True)
