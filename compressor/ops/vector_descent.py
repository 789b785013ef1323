"""Coordinate descent on a quadratic loss of a matrix of codewords and group scales.

L(Ŵ) = tr((Ŵ − W)·H·(Ŵ − W)ᵀ). With everything else fixed, the columns J of a row are best at ŵ_J − E_J·H_JJ⁻¹,
E = (Ŵ − W)·H, and among codewords at the nearest to that in the metric H_JJ: QuantEase's step (Behdin et al., arXiv
2309.01885), for vectors. With the codes fixed, the scales of a row are the solution of a small linear system. Neither
raises the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressor.ops.vector_quantization import nearest, nearest_within

_COLUMNS = 64


Path = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(points (rows, dim), weights (rows,), codewords (K, dim)) -> codes (rows,) that are chosen together."""


def best_codes(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, table: Tensor, kept: Tensor | None = None,
    path: Path | None = None,
) -> Tensor:  # fmt: skip
    """`codes` after one sweep over all columns, one vector of them at a time.

    weight (rows, columns), hessian (columns, columns) positive definite, codes (rows, columns/dim), scales (rows,
    n_groups) not 0, table (K, dim). Where `kept` (rows, columns) is False a codeword is 0. With `path` the codes of all
    rows are chosen at once, and not each by itself.
    """
    codes, dim = codes.clone(), table.shape[1]
    group = weight.shape[1] // scales.shape[1]
    values = decoded(codes, scales, table)
    error = values - weight
    for begin in range(0, weight.shape[1], _COLUMNS):
        here = slice(begin, min(begin + _COLUMNS, weight.shape[1]))
        slope, inner = error @ hessian[:, here], hessian[here, here]
        for j in range(begin, here.stop, dim):
            near = slice(j - begin, j - begin + dim)
            factor = torch.linalg.cholesky(inner[near, near])
            scale, current = scales[:, j // group].unsqueeze(1), values[:, j : j + dim]
            wanted = (current - torch.cholesky_solve(slope[:, near].T, factor).T) / scale
            if path is not None:
                chosen = path(wanted @ factor, scale[:, 0].square(), table @ factor)
            elif kept is None:
                chosen = nearest(wanted @ factor, table @ factor)
            else:
                chosen = nearest_within(wanted @ factor, kept[:, j : j + dim], table @ factor, table != 0)
            moved = table[chosen] * scale - current
            codes[:, j // dim] = chosen
            error[:, j : j + dim] += moved
            slope.addmm_(moved, inner[near])
    return codes


def best_scales(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The scales (rows, n_groups) of least loss for the codes; a group's own where its solution is not positive.

    Shapes as for `best_codes`.
    """
    rows, n_groups = scales.shape
    units = table[codes].flatten(1)
    group = units.shape[1] // n_groups
    pull = (weight @ hessian * units).view(rows, n_groups, group).sum(2)
    products = torch.empty(rows, n_groups, n_groups, device=weight.device)
    for i in range(n_groups):
        inside = slice(i * group, (i + 1) * group)
        products[:, i] = ((units[:, inside] @ hessian[inside]) * units).view(rows, n_groups, group).sum(2)
    ridge = 1e-6 * products.diagonal(dim1=1, dim2=2).amax(1, keepdim=True).clamp_min(1e-30)
    products.diagonal(dim1=1, dim2=2).add_(ridge)  # a group of zeros has no scale of its own
    found = torch.linalg.solve(products, pull)
    return torch.where((found > 0) & found.isfinite(), found, scales)


def row_losses(weight: Tensor, hessian: Tensor, matrix: Tensor) -> Tensor:
    """(ŵ − w)·H·(ŵ − w)ᵀ of each row: (rows,)."""
    error = matrix - weight
    return ((error @ hessian) * error).sum(1)


def decoded(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Ŵ (rows, columns)."""
    units = table[codes].flatten(1)
    return units * scales.repeat_interleave(units.shape[1] // scales.shape[1], 1)
