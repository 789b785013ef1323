"""The loss of a changed network on samples, measured: for importances, and to say what a sum of costs comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compressor.graph.blocks import first_tensor
from compressor.streaming import Batch, Network

Kind = Literal["perplexity", "cosine", "accuracy"]
"""Of the loss that is promised: relative rise of perplexity; 1 − cosine of embeddings; share of changed classes."""
TOKENS = 1024
_SENTENCE = 32
_POSITIONS = 64
EXAMPLES = 64


def probe(batches: Sequence[Batch], kind: Kind) -> list[Batch]:
    """A few samples of the calibration data: about 1,024 tokens, or 64 examples."""
    first = batches[0]
    if "input_ids" not in first:
        n = max(1, EXAMPLES // max(1, len(next(iter(first.values())))))
        return list(batches[:n])
    ids = first["input_ids"]
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    if kind == "cosine" and ids.shape[1] % _SENTENCE == 0:
        ids = ids.reshape(-1, _SENTENCE)
    return [{"input_ids": ids}]


@torch.no_grad()
def outputs(checkpoint: Any, batches: list[Batch], changed: Mapping[str, Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The first output per batch, float32, of the network with some tensors changed."""
    network = Network(checkpoint, fast=False)
    for name, change in changed.items():
        network.replace(name, change)
    for block, _, _ in network.sweep(batches):
        if not block:
            for batch in batches:
                yield _first(network.call(batch)).float()
            return
    with network.tail() as run:
        for batch, hidden in zip(batches, network.last, strict=True):
            yield _first(run(batch, hidden)).float()


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first_tensor(output)


@dataclass(frozen=True)
class Judged:
    """rise      what importances are measured in: KL in nats, 1 − cosine, or the squared error relative to the output
    promised  the loss as it is reported, of its Kind
    """

    rise: float
    promised: float


def judged(kind: Kind, wanted: Sequence[Tensor], found: Sequence[Tensor], logits: bool) -> Judged:
    """How far outputs are from those of the original; `logits` of classes are compared by KL."""
    a, b = torch.cat([*wanted]), torch.cat([*found])
    if kind == "cosine":
        first, second = (each.mean(1) if each.dim() == 3 else each for each in (a, b))
        rise = float((1 - functional.cosine_similarity(first.double(), second.double(), dim=-1)).mean().clamp_min(0))
        return Judged(rise, rise)
    if kind == "perplexity" or logits:
        rise = divergence(a.flatten(0, -2), b.flatten(0, -2))
    else:
        rise = float((a - b).pow(2).sum() / a.pow(2).sum().clamp_min(1e-30))
    if kind == "perplexity":
        return Judged(rise, float(np.expm1(min(rise, 50.0))))
    return Judged(rise, float((a.argmax(-1) != b.argmax(-1)).double().mean()))


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL in nats of rows of logits (n, classes), some at a time."""
    total = 0.0
    for p, q in zip(wanted.split(_POSITIONS), found.split(_POSITIONS), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(0.0, total / len(wanted))


@dataclass(frozen=True)
class Curve:
    """The promised loss of a sum of costs: straight lines between measured points, through nothing at no cost."""

    points: tuple[tuple[float, float], ...]

    def loss(self, cost: float) -> float:
        costs, losses = self._lines()
        if cost > costs[-1] and len(costs) > 1:
            return float(losses[-1] * cost / costs[-1])
        return float(np.interp(cost, costs, losses))

    def cost(self, loss: float) -> float:
        """The largest cost whose loss is at most `loss`."""
        costs, losses = self._lines()
        if loss >= losses[-1]:
            return float(costs[-1] * loss / max(losses[-1], 1e-30)) if losses[-1] > 0 else float("inf")
        above = int(np.flatnonzero(losses > loss)[0])
        low, high = losses[above - 1], losses[above]
        return float(costs[above - 1] + (costs[above] - costs[above - 1]) * (loss - low) / (high - low))

    def _lines(self) -> tuple[np.ndarray, np.ndarray]:
        ordered = sorted({(0.0, 0.0), *self.points})
        costs, losses = (np.array(column) for column in zip(*ordered, strict=True))
        return costs, np.maximum.accumulate(losses)
