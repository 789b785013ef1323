"""The loss of a changed network on samples, measured: for importances, and to say what a sum of costs comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compressor.core.batch import Batch
from compressor.core.output_kinds import Label, kind_of
from compressor.core.outputs import named_outputs
from compressor.sweeps.network import Network

Kind = Literal["perplexity", "cosine", "accuracy", "error"]
"""Of the loss that is promised: relative rise of perplexity; 1 − cosine of vectors; share of changed classes; relative
error of values."""
TOKENS = 1024
_SENTENCE = 32
_POSITIONS = 64
EXAMPLES, MANY_EXAMPLES = 64, 256


def probe(batches: Sequence[Batch], kind: Kind, examples: int = EXAMPLES) -> list[Batch]:
    """A few samples of the calibration data: about 1,024 tokens, with what else the forward is given beside them, or as
    many examples, in whole batches."""
    first = batches[0]
    if "input_ids" not in first:
        return list(batches[: math.ceil(examples / max(1, len(next(iter(first.values())))))])
    ids = first["input_ids"]
    n = max(1, TOKENS // ids.shape[1])
    if len(first) > 1:
        return [{name: values[:n] for name, values in first.items()}]
    ids = ids[:n]
    if kind != "perplexity" and ids.shape[1] % _SENTENCE == 0:
        ids = ids.reshape(-1, _SENTENCE)
    return [{"input_ids": ids}]


@torch.no_grad()
def outputs(
    checkpoint: Any, batches: list[Batch], changed: Mapping[str, Callable[[], Tensor]]
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """The outputs per batch by name, floats as float32, of the network with some tensors changed."""
    network = Network(checkpoint, fast=False)
    for name, change in changed.items():
        network.replace(name, change)
    for block, _, _ in network.sweep(batches):
        if not block:
            for batch in batches:
                yield _floats(network.call(batch))
            return
    with network.tail() as run:
        for batch, hidden in zip(batches, network.last, strict=True):
            yield _floats(run(batch, hidden))


def _floats(found: Any) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in named_outputs(found).items()}


@dataclass(frozen=True)
class Judged:
    """rise      what importances are measured in: KL in nats, 1 − cosine, or the squared error relative to the output
    promised  the loss as it is reported, of its Kind
    """

    rise: float
    promised: float


@dataclass(frozen=True)
class Judge:
    """How changed outputs are held against the original's: each of them by its own kind.

    kind       of the first output, or of the whole network
    measures   (kind of loss, whether they are logits, along which axis) of the outputs that are judged
    wanted     the original's, batch by batch
    """

    kind: Kind
    measures: dict[str, tuple[Kind, bool, int]]
    wanted: list[dict[str, Tensor]]

    @classmethod
    def of(cls, checkpoint: Any, samples: list[Batch], kind: Kind, labelled: bool) -> Judge:
        """From the original's outputs; of a language model the logits alone count, by perplexity.

        Args:
            kind: What the network's family is judged by.
            labelled: Whether outputs with classes are known to be logits.
        """
        wanted = list(outputs(checkpoint, samples, {}))
        first = next(iter(wanted[0]))
        if kind == "perplexity" and ("logits" in wanted[0] or wanted[0][first].dim() == 3):
            return cls(kind, {"logits" if "logits" in wanted[0] else first: ("perplexity", True, -1)}, wanted)
        inputs = {name: tensor.numpy() for name, tensor in samples[0].items()}
        measures: dict[str, tuple[Kind, bool, int]] = {}
        for name, tensor in wanted[0].items():
            found = kind_of(name, tensor.numpy(), inputs, checkpoint.config)
            each = _KINDS[found.label]
            measures[name] = (each, each == "accuracy" and (labelled or "logit" in name), found.axis)
        return cls(measures[first][0], measures, wanted)

    def judge(self, found: Sequence[dict[str, Tensor]]) -> Judged:
        """The rises of all outputs together, and the worst promised loss of one; `found` may end early."""
        each = []
        for name, (kind, logits, axis) in self.measures.items():
            wanted, given = (
                [batch[name].movedim(axis, -1) if batch[name].dim() else batch[name] for batch in batches]
                for batches in (self.wanted[: len(found)], found)
            )
            each.append(judged(kind, wanted, given, logits))
        return Judged(sum(one.rise for one in each), max(one.promised for one in each))


_KINDS: dict[Label, Kind] = {
    "classes": "accuracy", "tokens": "accuracy", "positions": "accuracy", "vectors": "cosine", "scores": "error",
    "values": "error", "numbers": "error",
}  # fmt: skip


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
    if kind == "error":
        return Judged(rise, rise**0.5)
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
    """The promised loss of a sum of costs: lines between measured points, through nothing at no cost.

    power   the lines are straight over cost^power. A relative error is the root of its cost, and a share of changed
            classes grows with it: as many predictions lie within a distance of the boundary as it is long
    """

    points: tuple[tuple[float, float], ...]
    power: float = 1.0

    @classmethod
    def of(cls, kind: Kind, points: Iterable[tuple[float, float]]) -> Curve:
        """For losses of this kind."""
        return cls(tuple(points), 0.5 if kind in ("accuracy", "error") else 1.0)

    def loss(self, cost: float) -> float:
        at, losses = self._lines()
        x = cost**self.power
        if x > at[-1] and len(at) > 1:
            return float(losses[-1] * x / at[-1])
        return float(np.interp(x, at, losses))

    def cost(self, loss: float) -> float:
        """The largest cost whose loss is at most `loss`."""
        at, losses = self._lines()
        if loss >= losses[-1]:
            x = float(at[-1] * loss / max(losses[-1], 1e-30)) if losses[-1] > 0 else math.inf
        else:
            above = int(np.flatnonzero(losses > loss)[0])
            low, high = losses[above - 1], losses[above]
            x = float(at[above - 1] + (at[above] - at[above - 1]) * (loss - low) / (high - low))
        return x ** (1 / self.power)

    def _lines(self) -> tuple[np.ndarray, np.ndarray]:
        ordered = sorted({(0.0, 0.0), *self.points})
        costs, losses = (np.array(column) for column in zip(*ordered, strict=True))
        return costs**self.power, np.maximum.accumulate(losses)
