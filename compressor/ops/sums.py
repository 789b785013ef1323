"""Sums whose last bits do not depend on the number of threads.

Over a whole tensor torch adds up as many parts as it has threads. What such a sum decides, a scale or which of two
codes is nearer, would be another elsewhere. Here the parts have a fixed length, each short enough for one thread; sums
along a dimension need nothing, as every one of them is of one thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART = 16_384
"""Values that torch adds up in one thread: half of what it divides."""


def total(values: Tensor) -> Tensor:
    """Σ x over all of a tensor, a scalar."""
    flat = values.flatten()
    if len(flat) <= PART:
        return flat.sum()
    whole = len(flat) // PART * PART
    parts = flat[:whole].view(-1, PART).sum(1)
    return total(torch.cat([parts, flat[whole:].sum().view(1)]))


def mean(values: Tensor) -> Tensor:
    """Σ x / n over all of a tensor, a scalar; NaN of an empty one."""
    return values.mean() if values.numel() <= PART else total(values) / values.numel()
