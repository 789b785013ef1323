"""Error feedback: quantise columns in order, and let the columns still to come make up for each error.

GPTQ (Frantar et al., arXiv 2210.17323); for vectors of columns the block form of QuIP# (arXiv 2402.04396): with
H⁻¹ = UᵀU, the error of columns J enters the loss as ‖(W_J − Ŵ_J)·U_JJ⁻¹‖², and the columns after J absorb it best by
W_rest −= (W_J − Ŵ_J)·U_JJ⁻¹·U_J,rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Quantise = Callable[[int, Tensor, Tensor], Tensor]


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


def error_feedback(weight: Tensor, factor: Tensor, step: int, quantise: Quantise, buffer: int = 64) -> Tensor:
    """Ŵ (out, in): `step` columns at a time, errors fed forward through `factor` = U of `inverse_factor`.

    quantise(start, columns, factor_jj) → (out, step) chooses the values of columns start … start + step; `columns`
    (out, ≥ step) are the updated weights from `start` to the end of the buffer. `buffer` is a multiple of `step`, and
    of the group if quantise looks ahead over one.
    """
    weight = weight.clone()
    chosen = torch.empty_like(weight)
    n_columns = weight.shape[1]
    for begin in range(0, n_columns, buffer):
        end = min(begin + buffer, n_columns)
        current = weight[:, begin:end].clone()
        errors = torch.zeros_like(current)
        for j in range(0, end - begin, step):
            here = slice(begin + j, min(begin + j + step, end))
            factor_jj = factor[here, here]
            values = quantise(begin + j, current[:, j:], factor_jj)
            chosen[:, here] = values
            error = torch.linalg.solve_triangular(factor_jj, current[:, j : j + step] - values, upper=True, left=False)
            errors[:, j : j + step] = error
            current[:, j + step :] -= error @ factor[here, here.stop : end]
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return chosen
