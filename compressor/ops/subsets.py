"""Subsets of a fixed size, drawn by independent coins that happen to show that many heads (conditional Bernoulli).

P(S) = exp(Σ_{i∈S} θ_i) / e_k(exp θ), e_k the elementary symmetric polynomial: the sum over all subsets of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_elementary(logits: Tensor, k: int) -> Tensor:
    """log e_r(exp θ_i … exp θ_n−1) for every i and r: (n,) to (n + 1, k + 1), −∞ where r > n − i; differentiable."""
    row = torch.cat([logits.new_zeros(1), logits.new_full((k,), -torch.inf)])
    rows = [row]
    for logit in logits.flip(0):
        taken = torch.cat([logits.new_full((1,), -torch.inf), row[:-1] + logit])
        both = torch.stack([row, taken])
        finite = both.isfinite().any(0)
        row = torch.where(finite, torch.logsumexp(torch.where(finite, both, 0.0), 0), -torch.inf)
        rows.append(row)
    return torch.stack(rows[::-1])


def subset_log_probability(logits: Tensor, subset: Tensor) -> Tensor:
    """log P(S) of a subset as a BoolTensor (n,) among all of its size: scalar."""
    k = int(subset.sum())
    return logits[subset].sum() - log_elementary(logits, k)[0, k]


def sample_subset(logits: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of n as a BoolTensor (n,).

    Raises:
        ValueError: There are fewer than k.
    """
    if k > len(logits):
        raise ValueError(f"{k} of {len(logits)} cannot be drawn")
    table = log_elementary(logits.detach().double(), k)
    draws = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    found = torch.zeros(len(logits), dtype=torch.bool)
    left = k
    for i, logit in enumerate(logits.detach().double()):
        if left == 0:
            break
        share = float((logit + table[i + 1, left - 1] - table[i, left]).exp())
        if float(draws[i]) < share or len(logits) - i == left:
            found[i] = True
            left -= 1
    return found


def subset_shares(logits: Tensor, k: int) -> Tensor:
    """P(i ∈ S): (n,) — the gradient of log e_k."""
    theta = logits.detach().double().requires_grad_(True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(log_elementary(theta, k)[0, k], theta)
    return found
