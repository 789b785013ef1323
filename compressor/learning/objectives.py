"""What students learn on: the original's predictions, or the output of the original's block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_POSITIONS = 512
"""Whose logits are there at a time."""
_SAMPLED = 32
"""Of them, on which the divergence itself is measured."""


@dataclass(frozen=True)
class Divergence:
    """The mean KL over tokens, and its gradients by the head's inputs and, if wanted, by the head's table."""

    to_rows: Tensor
    to_table: Tensor | None
    loss: float


@torch.no_grad()
def divergence(
    rows: Tensor, table: Tensor, original_rows: Tensor, original_table: Tensor, wants_table: bool
) -> Divergence:
    """KL(original ‖ student) of the head's inputs `rows` (tokens, width) and its `table` (vocabulary, width).

    The gradients of the logits, softmax(student) − softmax(original), are formed a few rows at a time; the loss is of a
    sample of them.
    """
    parts, total, counted = [], 0.0, 0
    to_table = torch.zeros(table.shape) if wants_table else None
    for part, original in zip(rows.split(_POSITIONS), original_rows.split(_POSITIONS), strict=True):
        target = functional.linear(original, original_table).float().softmax(-1)
        logits = functional.linear(part, table).float()
        log_q = logits[:_SAMPLED].log_softmax(-1)
        sample = target[:_SAMPLED]
        total += float((sample * (sample.clamp_min(1e-20).log() - log_q)).sum())
        counted += len(log_q)
        difference = (logits.softmax(-1).sub_(target) / len(rows)).to(table.dtype)
        parts.append((difference @ table).float())
        if to_table is not None:
            to_table += difference.T @ part
    return Divergence(torch.cat(parts), to_table, total / counted)


def weighted_error(output: Tensor, target: Tensor, tokens: Tensor | None, channels: Tensor | None) -> Tensor:
    """mean_t a_t · mean_c b_c (y − ŷ)²_tc, a scalar: outputs (…, width), weights a (tokens,) and b (width,), or none.

    The weights are the gradient of the final loss, so that the few massive activations, which are most of the plain
    squared error, do not hide the rest (BRECQ's diagonal Fisher, arXiv 2102.05426, in rank one).
    """
    error = (output - target).flatten(0, -2).pow(2)
    if channels is not None:
        error = error * channels
    error = error.mean(1)
    if tokens is not None:
        error = error * tokens
    return error.mean()
