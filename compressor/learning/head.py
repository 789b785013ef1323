"""A language model's logits as its output head and what follows it make them: scaled, or softly capped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_SMALL, _HUGE = 1e-3, 1e9
_TRIED = torch.linspace(-40.0, 40.0, 17)


@dataclass(frozen=True)
class Logits:
    """c·tanh(s·z / c) of each output z of the head; without a cap c, s·z.

    scale   s: granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`
    cap     c: Gemma's `final_logit_softcapping`
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def measured(cls, network: Callable[[Tensor], Tensor]) -> Logits | None:
        """What a network does to outputs of its head, found by giving it some (n,); None where it is something else."""
        ends = network(torch.tensor([_SMALL, _HUGE]))
        if ends.shape != (2,) or not bool(ends.isfinite().all()):
            return None
        scale, cap = float(ends[0]) / _SMALL, float(ends[1])
        scale = 1.0 if abs(scale - 1) < 1e-5 else scale
        found = cls(scale, None if abs(cap) > 0.99 * abs(scale) * _HUGE else cap)
        if not scale or cap == 0:
            return None
        tried = torch.cat([_TRIED, _TRIED * (found.cap or 1.0) / 16]) / abs(scale)
        return found if torch.allclose(network(tried), found(tried), rtol=1e-3, atol=1e-4) else None

    def __call__(self, outputs: Tensor) -> Tensor:
        scaled = outputs if self.scale == 1.0 else outputs * self.scale
        return scaled if self.cap is None else self.cap * (scaled / self.cap).tanh()

    def through(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """A gradient by the logits as one by the head's outputs."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


@dataclass(frozen=True)
class Head:
    """An output head: its table (vocabulary, width), its bias (vocabulary,) and what becomes of x·Wᵀ + b."""

    table: Tensor
    bias: Tensor | None = None
    logits: Logits = Logits()

    def __call__(self, rows: Tensor) -> Tensor:
        """The logits, float32 (tokens, vocabulary), of its inputs (tokens, width) in the table's precision."""
        outputs = functional.linear(rows, self.table).float()
        return self.logits(outputs if self.bias is None else outputs + self.bias)
