"""A batch: the arguments of a network's forward by name; {"": tensor} is a single one, given by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]


def as_batch(arrays: Mapping[str, np.ndarray]) -> Batch:
    """Arrays as arguments: a single one, unless it is input_ids, goes by position."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if len(tensors) == 1 and "input_ids" not in tensors:
        return {"": next(iter(tensors.values()))}
    return tensors


def arguments(batch: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments."""
    return ((batch[""],), {}) if "" in batch else ((), dict(batch))


def call(forward: Callable[..., Any], batch: Mapping[str, Tensor]) -> Any:
    """What a network, or a function that stands for it, makes of a batch, whose own tensors it may write into."""
    args, kwargs = arguments({name: tensor.clone() for name, tensor in batch.items()})
    return forward(*args, **kwargs)


@dataclass(frozen=True)
class Examples:
    """What a training learns from: inputs of the forward by name, along the first axis; "" is the one by position.

    Args:
        labels: (n,) classes, or (n, tokens); None where there are none.
        wanted: The original's outputs, where they are known; it then need not run.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    wanted: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Some of them, as a batch."""
        labels = None if self.labels is None else self.labels[index]
        return {name: values[index] for name, values in self.inputs.items()}, labels

    def part(self, index: Tensor) -> Examples:
        """Some of them, with all that is known of each."""
        inputs, labels = self.take(index)
        return Examples(inputs, labels, None if self.wanted is None else self.wanted[index])
