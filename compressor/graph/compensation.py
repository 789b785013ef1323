"""Biases in place of removed units: what these add on average to the layers that read them.

An et al., "Fluctuation-based adaptive structured pruning for large language models" (FLAP), AAAI 2024, arXiv
2312.11983, section 3.4: B = W_removed · mean(X_removed), of the original network on calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.batch import Batch
from compressor.core.structure import Removal
from compressor.graph.blocks import on_input
from compressor.graph.surgery import dropped


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def readers(module: nn.Module, removal: Removal) -> dict[str, Tensor]:
    """Path of each linear layer that reads units of the removal -> the columns of its matrix that go."""
    found = {}
    for (tensor, dim), places in dropped(removal).items():
        path, _, kind = tensor.rpartition(".")
        layer = module.get_submodule(path)
        if kind == "weight" and _is_linear(layer) and dim == (1 if isinstance(layer, nn.Linear) else 0):
            found[path] = places
    return found


@torch.no_grad()
def mean_inputs(
    module: nn.Module, paths: Sequence[str], call: Callable[[nn.Module, Batch], Any], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Mean over batches and positions of what these layers read: (in,), float64."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(paths, 0)

    def watch(path: str) -> Callable[[Tensor], None]:
        def look(given: Tensor) -> None:
            rows = given.flatten(0, -2).double()
            sums[path] = sums.get(path, 0) + rows.sum(0)
            counts[path] += len(rows)

        return look

    hooks = [on_input(module.get_submodule(path), watch(path)) for path in paths]
    try:
        for batch in batches:
            call(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / counts[path] for path, total in sums.items()}


@torch.no_grad()
def compensate(smaller: nn.Module, original: nn.Module, removal: Removal, means: dict[str, Tensor]) -> list[str]:
    """Adds W_removed · mean(X_removed) to the biases of the smaller network; names of those that are new.

    Args:
        original: With the weights of the units that were removed.
        means: Of `mean_inputs` of the original, by the paths of `readers`.
    """
    gone, added = dropped(removal), []
    for path, columns in readers(original, removal).items():
        if path not in means:
            continue
        old, new = original.get_submodule(path), smaller.get_submodule(path)
        straight = isinstance(old, nn.Linear)
        stored = old.get_parameter("weight").double()
        weight = stored if straight else stored.T
        bias = weight[:, columns] @ means[path][columns]
        rows = gone.get((f"{path}.weight", 0 if straight else 1))
        if rows is not None:
            keep = torch.ones(len(bias), dtype=torch.bool)
            keep[rows] = False
            bias = bias[keep]
        if new.bias is None:
            weight = new.get_parameter("weight")
            new.bias = nn.Parameter(torch.zeros(len(bias), dtype=weight.dtype), requires_grad=False)
            added.append(f"{path}.bias")
        own = new.get_parameter("bias")
        own += bias.to(own.dtype)
    return added
