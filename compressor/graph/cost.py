"""Multiplications of a forward: those of a layer's matrix, at every position that it is applied to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compressor.core.structure import Removal
from compressor.graph.surgery import shapes_without


def positions(module: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Weight's name -> positions of one example (pixels or tokens, summed over calls) that it is multiplied at.

    Of linear layers and convolutions. Attention's products of activations with activations are not counted.
    """
    n = len(next(iter(batch.values())))
    found: dict[str, int] = {}

    def count(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen = inputs[0] if isinstance(layer, _ConvTransposeNd) else output
        channels = seen.shape[1 if isinstance(layer, _ConvNd) else -1]
        found[name] = found.get(name, 0) + seen.numel() // channels // n

    watch_layers(module, call, batch, count)
    return found


@torch.no_grad()
def watch_layers(
    module: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Mapping[str, Tensor],
    note: Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], None],
) -> None:  # fmt: skip
    """Calls the network on a batch; `note` is told of each call of a linear layer or convolution: its weight's name,
    the layer, its inputs and its output."""

    def telling(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: note(name, layer, inputs, output)

    hooks = [
        layer.register_forward_hook(telling(f"{path}.weight" if path else "weight"))
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, _ConvNd)) or type(layer).__name__ == "Conv1D"
    ]
    try:
        call(module, dict(batch))
    finally:
        for hook in hooks:
            hook.remove()


def multiplications(module: nn.Module, removal: Removal, at: Mapping[str, int]) -> int:
    """Of one example, in the network without these units; `at` is what `positions` found."""
    shapes = shapes_without(module, removal)
    return sum(torch.Size(shapes[name]).numel() * n for name, n in at.items() if name in shapes)
