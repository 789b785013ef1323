"""Layers whose inputs are signs: x̂ = a·sign((x − b) / a), a threshold b per channel and a size a for the layer.

A threshold is needed where the network has a Relu before the layer: nothing it gives is negative, and all signs would
be the same. Z. Liu et al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions",
ECCV 2020, arXiv 2003.03488 (RSign); the size is ours, for networks without a batch norm behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

THRESHOLD, SIZE = "input_threshold", "input_size"
Sign = Callable[[Tensor], Tensor]


def hard_sign(z: Tensor) -> Tensor:
    """+1 where z ≥ 0, −1 elsewhere."""
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)


class SignedInputs:
    """A hook before the forward of a layer that holds `input_threshold` (channels,) and `input_size` (1,).

    axis   of the channels in the input
    sign   of what is compared; a training puts one with a gradient in its place
    """

    def __init__(self, axis: int) -> None:
        self.axis, self.sign = axis, hard_sign

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        threshold, size = cast(Tensor, layer.input_threshold), cast(Tensor, layer.input_size)
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return (size * self.sign((x - threshold.view(shape)) / size), *inputs[1:])


def input_channels(layer: nn.Module) -> tuple[int, int]:
    """(channels of the layer's input, their axis from the end)."""
    weight: Any = layer.weight
    axes = weight.dim() - 1
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.in_channels, -axes
    return (weight.shape[0] if type(layer).__name__ == "Conv1D" else weight.shape[1]), -1


def sign_inputs(layer: nn.Module) -> SignedInputs:
    """Makes a layer binarise its inputs, about 0 and in size 1 until its two tensors are set."""
    channels, axis = input_channels(layer)
    like: Any = layer.weight
    layer.register_parameter(THRESHOLD, nn.Parameter(torch.zeros(channels, dtype=like.dtype, device=like.device)))
    layer.register_buffer(SIZE, torch.ones(1, dtype=like.dtype, device=like.device))
    hook = SignedInputs(axis)
    layer.register_forward_pre_hook(hook)
    return hook


def signed_layers(module: nn.Module) -> list[str]:
    """The paths of the layers with such a hook."""
    return [
        path
        for path, child in module.named_modules()
        if any(isinstance(hook, SignedInputs) for hook in child._forward_pre_hooks.values())
    ]
