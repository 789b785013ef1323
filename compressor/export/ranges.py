"""Ranges of activations: what a graph's values reach on calibration batches, in onnxruntime, by several rules.

No rule is the best for all: outliers that cost all other values their precision are better clipped, and those that a
detector's scores hang on are not. `range_choice` chooses per tensor; here is what it chooses from.

    clipped   the mean over examples of two small quantiles of each
    mean      the mean over examples of the extremes
    widest    the extremes of all examples
    closest   the part of the widest range with which rounded values are nearest, in squares
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from torch import Tensor

from compressor.runtime.sessions import Settings, in_pieces

CLIPPED = 1e-4
"""Share of an example's values that is cut off at either end."""
Rule = Literal["clipped", "mean", "widest", "closest"]
RULES: tuple[Rule, ...] = ("clipped", "mean", "widest", "closest")
_SAMPLED = 512
"""Values of an example that stand for all where rounding errors are added up."""
_PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)

Range = tuple[float, float]
Feed = dict[str, np.ndarray]


@dataclass
class Seen:
    """What was seen of one value."""

    clipped: np.ndarray = field(default_factory=lambda: np.zeros(2))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(2))
    widest: Range = (np.inf, -np.inf)
    sampled: list[np.ndarray] = field(default_factory=list)
    n: int = 0

    def add(self, values: np.ndarray) -> None:
        """One example's."""
        low, high = float(values.min()), float(values.max())
        self.clipped += example_range(values)
        self.mean += (low, high)
        self.widest = (min(self.widest[0], low), max(self.widest[1], high))
        self.sampled.append(values.ravel()[:: max(1, values.size // _SAMPLED)][:_SAMPLED].astype(np.float32))
        self.n += 1

    def range(self, rule: Rule) -> Range:
        """The range by a rule."""
        if rule == "widest":
            return self.widest
        if rule == "closest":
            return closest(np.concatenate(self.sampled), self.widest)
        low, high = (self.clipped if rule == "clipped" else self.mean) / self.n
        return float(low), float(high)


def examples_of(session: onnxruntime.InferenceSession, batches: Iterable[Mapping[str, Tensor]]) -> list[Feed]:
    """Of batches, one at a time: every activation of the network is held at once."""
    return list(_examples(batches, session.get_inputs()[0].name))


def open_graph(graph: Path) -> onnxruntime.InferenceSession:
    """A session that computes on floats, whatever pairs of QuantizeLinear and DequantizeLinear there are."""
    return Settings(None, {"session.disable_quant_qdq": "1"}, arena=False).open(str(graph))


def values_of(session: onnxruntime.InferenceSession, feed: Feed, outputs: Sequence[str]) -> list[np.ndarray]:
    """The named outputs on an example."""
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    names = list(outputs)
    return in_pieces(feed, shapes, lambda part: [np.asarray(values) for values in session.run(names, part)])


def seen(session: onnxruntime.InferenceSession, examples: Iterable[Feed], outputs: Sequence[str]) -> list[Seen]:
    """What each named output of a graph reaches."""
    found = [Seen() for _ in outputs]
    for feed in examples:
        for each, values in zip(found, values_of(session, feed, outputs), strict=True):
            each.add(values)
    return found


def example_range(values: np.ndarray, clipped: float = CLIPPED) -> Range:
    """The values at rank ⌊clipped·n⌋ from below and from above; with few values the extremes."""
    flat = values.ravel()
    rank = int(clipped * flat.size)
    ordered = np.partition(flat, (rank, flat.size - 1 - rank))
    return float(ordered[rank]), float(ordered[flat.size - 1 - rank])


def closest(values: np.ndarray, widest: Range) -> Range:
    """The part of a range that leaves the least Σ (x − x̂)² when x is rounded to 255 steps of it, and clipped."""
    low, high = min(widest[0], 0.0), max(widest[1], 0.0)

    def error(part: float) -> float:
        step = (part * (high - low) / 255) or 1.0
        rounded = np.clip(np.round(values / step) * step, part * low, part * high)
        return float(((rounded - values) ** 2).sum())

    best = min(_PARTS, key=error)
    return best * low, best * high


def _examples(batches: Iterable[Mapping[str, Tensor]], first: str) -> Iterator[Feed]:
    """One at a time. `first` names the input that has no name."""
    for batch in batches:
        arrays = {name or first: tensor.numpy() for name, tensor in batch.items()}
        for i in range(min(len(array) for array in arrays.values() if array.ndim)):
            yield {name: array[i : i + 1] if array.ndim else array for name, array in arrays.items()}
