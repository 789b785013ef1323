"""Error feedback: quantise columns in order, and let the columns still to come make up for each error.

GPTQ (Frantar et al., arXiv 2210.17323); for vectors of columns the block form of QuIP# (arXiv 2402.04396): with
H⁻¹ = UᵀU, the error of columns J enters the loss as ‖(W_J − Ŵ_J)·U_JJ⁻¹‖², and the columns after J absorb it best by
W_rest −= (W_J − Ŵ_J)·U_JJ⁻¹·U_J,rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BUFFER = 64
"""Columns of a block: those after it are brought up to date once for all of its errors."""

Quantise = Callable[[int, Tensor, Tensor], Tensor]
Visit = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U (in, in), upper triangular, with H⁻¹ = UᵀU, after adding damping·mean(diag H); dead inputs count as 1.

    Raises the damping tenfold, up to three times, where rounding leaves H indefinite.
    """
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal().masked_fill(dead, 1.0).mean()
    for _ in range(4):
        work = hessian.T.clone(memory_format=torch.contiguous_format).T  # column by column, as LAPACK wants it
        work.diagonal().add_(damping * mean).masked_fill_(dead, 1.0 + float(damping * mean))
        failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(work, out=(work, failed))  # in place: it is large
        if not failed:
            torch.cholesky_inverse(work, out=work)
            torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
            if not failed:
                return work
        damping *= 10
    raise ValueError("the Hessian has no Cholesky factor; are the calibration activations finite?")


def error_feedback(weight: Tensor, factor: Tensor, step: int, quantise: Quantise, buffer: int = BUFFER) -> Tensor:
    """Ŵ (out, in): `step` columns at a time, errors fed forward through `factor` = U of `inverse_factor`.

    quantise(start, columns, factor_jj) → (out, step) chooses the values of columns start … start + step; `columns`
    (out, ≥ step) are the updated weights from `start` to the end of the buffer. `buffer` is a multiple of `step`, and
    of the group if quantise looks ahead over one.
    """

    def visit(begin: int, current: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        chosen, errors, n_columns = torch.empty_like(current), torch.empty_like(current), current.shape[1]
        for j in range(0, n_columns, step):
            here = slice(j, min(j + step, n_columns))
            factor_jj = local[here, here]
            chosen[:, here] = values = quantise(begin + j, current[:, j:], factor_jj)
            error = torch.linalg.solve_triangular(factor_jj, current[:, here] - values, upper=True, left=False)
            errors[:, here] = error
            current[:, here.stop :] -= error @ local[here, here.stop :]
        return chosen, errors

    return feed_forward(weight, factor, buffer, visit)


def feed_forward(weight: Tensor, factor: Tensor, buffer: int, visit: Visit) -> Tensor:
    """Ŵ (out, in): `buffer` columns at a time.

    visit(start, columns, factor_jj) → the values of columns start … start + buffer, and their errors (W_J − Ŵ_J)·U_JJ⁻¹
    (out, buffer); `columns` are the updated weights, its own to change.
    """
    weight = weight.clone()
    chosen = torch.empty_like(weight)
    for begin in range(0, weight.shape[1], buffer):
        here = slice(begin, min(begin + buffer, weight.shape[1]))
        chosen[:, here], errors = visit(begin, weight[:, here].clone(), factor[here, here])
        weight[:, here.stop :].addmm_(errors, factor[here, here.stop :], alpha=-1)
    return chosen
