"""Least squares under a mask: the kept weights of each row take over what the dropped ones gave.

Each row of Ŵ minimises (ŵ − w)ᵀ·H·(ŵ − w) over its kept entries, the others being zero. All rows at once by conjugate
gradients, preconditioned by H's diagonal: a factorisation for each row's own mask takes as long at the sizes of a
language model, and cannot end early.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.ops.gram import damped


def masked_fit(
    weight: Tensor, kept: Tensor, hessian: Tensor, damping: float = 0.01, steps: int = 20, close: float = 1e-3
) -> Tensor:
    """Ŵ (out, in), zero where not `kept`, whose outputs come nearest to those of W (out, in) on inputs of H (in, in).

    Inputs that never come (H_jj = 0) keep their weights. H is damped by a share of its mean diagonal, which holds Ŵ
    near W where the inputs say little. Ends after `steps`, or when the gradient has shrunk to the share `close`.
    """
    moment = damped(hessian.float(), damping)
    scale = moment.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    found = weight * kept
    left = ((weight - found) @ moment).mul_(kept)
    ready = left / scale
    step, product = ready.clone(), (left * ready).sum(1, keepdim=True)
    first = product.sum()
    for _ in range(steps):
        if not bool(product.sum() > close**2 * first):
            break
        moved = (step @ moment).mul_(kept)
        curvature = (step * moved).sum(1, keepdim=True)
        length = torch.where(curvature > 0, product / curvature.clamp_min(1e-30), 0.0)
        found.addcmul_(length, step)
        left.addcmul_(length, moved, value=-1)
        ready = left / scale
        after = (left * ready).sum(1, keepdim=True)
        step.mul_(torch.where(product > 0, after / product.clamp_min(1e-30), 0.0)).add_(ready)
        product = after
    return found
