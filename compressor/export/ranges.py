"""Ranges of activations: what a graph's outputs reach on calibration batches, in onnxruntime.

Per example the values between two small quantiles count, and their mean over examples is the range: a few outliers,
which would cost all others their precision, are clipped. On MobileNetV2 this is better than the extremes, quantiles of
all examples together, and ranges of least error; docs/runtime.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from torch import Tensor

from compressor.runtime.sessions import in_pieces

CLIPPED = 1e-4
"""Share of an example's values that is cut off at either end."""

Range = tuple[float, float]


def output_ranges(graph: Path, batches: Iterable[Mapping[str, Tensor]], outputs: list[str]) -> list[Range]:
    """(lowest, highest) of each named output of a graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0]
    fixed = first.shape[0] if first.shape and isinstance(first.shape[0], int) else None
    total, count = np.zeros((len(outputs), 2)), 0
    for inputs in _examples(batches, first.name):
        found = in_pieces(inputs, fixed, lambda part: [np.asarray(values) for values in session.run(outputs, part)])
        total += [example_range(values) for values in found]
        count += 1
    return [(float(low), float(high)) for low, high in total / max(count, 1)]


def example_range(values: np.ndarray, clipped: float = CLIPPED) -> Range:
    """The values at rank ⌊clipped·n⌋ from below and from above; with few values the extremes."""
    flat = values.ravel()
    rank = int(clipped * flat.size)
    ordered = np.partition(flat, (rank, flat.size - 1 - rank))
    return float(ordered[rank]), float(ordered[flat.size - 1 - rank])


def _examples(batches: Iterable[Mapping[str, Tensor]], first: str) -> Iterator[dict[str, np.ndarray]]:
    """One at a time: every activation of the network is held at once. `first` names the input that has no name."""
    for batch in batches:
        arrays = {name or first: tensor.numpy() for name, tensor in batch.items()}
        for i in range(min(len(array) for array in arrays.values() if array.ndim)):
            yield {name: array[i : i + 1] if array.ndim else array for name, array in arrays.items()}
