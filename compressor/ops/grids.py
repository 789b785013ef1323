"""Uniform grids per group of columns: the scale, and the zero point, that lose least.

ŵ = s·(clip(round(w/s + z), 0, 2**b − 1) − z). Scales come from a search over shrink factors, as in GPTQ's and
llama.cpp's quantisers; errors may be weighted per column.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compressor.ops.compiled import compiled, on_host, over_rows
from compressor.ops.widths import zero_steps

KINDS = ("middle", "half", "learned", "fine")
"""Of zero points, as compiled loops count them."""


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
    size, emphasis = groups.shape[-1], torch.as_tensor(weights).float()
    emphasis = emphasis.expand(*emphasis.shape[:-1], size).reshape(-1, size)
    scale, point = (torch.empty(*groups.shape[:-1], 1) for _ in range(2))
    given = *on_host(groups.float().reshape(-1, size), emphasis), scale.view(-1).numpy(), point.view(-1).numpy()

    def search(here: slice) -> None:
        _search_rows(*given, here.start, here.stop, shares(bits, n_steps), KINDS.index(zero), bits, signed)

    over_rows(scale.numel(), search)
    return scale.to(groups.device), point.to(groups.device)


def shares(bits: int, n_steps: int = 20) -> np.ndarray:
    """Shares of a group's range that are tried."""
    return torch.linspace(1.0, 0.35 if bits > 2 else 0.2, n_steps).numpy()


@compiled
def _search_rows(
    groups, emphasis, scales, points, begin, end, tried, kind, bits, signed
):  # pragma: no cover - compiled
    """Fills scales and points of groups begin … end; `emphasis` has as many rows as there are different ones."""
    for row in range(begin, end):
        scales[row], points[row] = best_grid(groups[row], emphasis[row % len(emphasis)], tried, kind, bits, signed)


@compiled
def best_grid(values, emphasis, tried, kind, bits, signed):  # pragma: no cover - compiled
    """Scale and zero of one group (size,) for `search_scale`; `kind` is the place of its zero in KINDS."""
    one, tiny = np.float32(1), np.float32(2.0**-14)
    top = np.float32(2**bits - 1)
    low, high = np.float32(0), np.float32(0)
    for k in range(len(values)):
        low, high = min(low, values[k]), max(high, values[k])
    extreme = -low if -low >= high else -high
    steps = np.float32(1) if kind == 2 else np.float32(2 ** (8 - bits))
    best_scale, best_point, best, first = tiny, np.float32(0), np.float32(0), True
    for share in tried:
        if kind >= 2:
            scale = max((high - low) * share / top, tiny)
            point = min(max(np.rint(-low * share / scale * steps), np.float32(0)), (top + one) * steps - one) / steps
        elif kind == 1:
            scale, point = max(abs(extreme) * share / (top / np.float32(2)), tiny), top / np.float32(2)
        else:
            point = np.float32(2 ** (bits - 1))
            scale = extreme * share / point if signed else abs(extreme) * share / (point - np.float32(0.5))
            scale = tiny if abs(scale) < tiny else scale
        inverse, error = one / scale, np.float32(0)
        for k in range(len(values)):
            found = min(max(np.rint(values[k] * inverse + point), np.float32(0)), top)
            lost = (found - point) * scale - values[k]
            error += emphasis[k] * lost * lost
        if first or error < best:
            best_scale, best_point, best, first = scale, point, error, False
    return best_scale, best_point
