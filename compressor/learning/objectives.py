"""What students learn on: the original's predictions, or the output of the original's block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.learning.head import Head

_POSITIONS = 128
"""Whose logits are there at a time."""
_ENTRIES = 8192
"""Of the table, whose gradients are added at a time."""
_SAMPLED = 8
"""Of them, on which the divergence itself is measured."""


@dataclass(frozen=True)
class Divergence:
    """The mean KL over tokens, and its gradients by the head's inputs and, if wanted, by its table and its bias."""

    to_rows: Tensor
    to_table: Tensor | None
    to_bias: Tensor | None
    loss: float


@dataclass(frozen=True)
class Wanted:
    """Of which parts of the student's head gradients are wanted."""

    table: bool
    bias: bool


@torch.no_grad()
def divergence(rows: Tensor, head: Head, original_rows: Tensor, original: Head, wanted: Wanted) -> Divergence:
    """KL(original ‖ student) of the heads' inputs (tokens, width).

    The gradients of the logits, softmax(student) − softmax(original), are formed a few rows at a time; the loss is of a
    sample of them.
    """
    parts, total, counted = [], 0.0, 0
    table = head.table
    to_table = torch.zeros(table.shape, device=table.device) if wanted.table else None
    to_bias = torch.zeros(len(table), device=table.device) if wanted.bias else None
    for part, original_part in zip(rows.split(_POSITIONS), original_rows.split(_POSITIONS), strict=True):
        target = original(original_part).softmax(-1)
        logits = head(part)
        log_q = logits[:_SAMPLED].log_softmax(-1)
        sample = target[:_SAMPLED]
        total += float((sample * (sample.clamp_min(1e-20).log() - log_q)).sum())
        counted += len(log_q)
        difference = head.logits.through(logits.softmax(-1).sub_(target) / len(rows), logits)
        if to_bias is not None:
            to_bias += difference.sum(0)
        difference = difference.to(table.dtype)
        parts.append((difference @ table).float())
        if to_table is not None:
            for some in range(0, len(to_table), _ENTRIES):
                to_table[some : some + _ENTRIES] += difference[:, some : some + _ENTRIES].T @ part
    return Divergence(torch.cat(parts), to_table, to_bias, total / counted)


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
