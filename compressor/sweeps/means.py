"""Calibration of what passes leave dense: biases and the means of batch norms, after the weights are encoded.

Rounded weights move the mean of a layer's output, channel by channel; depthwise convolutions, of nine weights a
channel, the most. The shift is measured on calibration batches and taken off, layer after layer: bias correction, in
its empirical form, of M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, https://arxiv.org/abs/1906.04721.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.core.memory import give_back
from compressor.graph.blocks import InputsFirst
from compressor.sweeps.network import Arguments

Means = dict[str, list[Tensor]]
"""Name of a module -> mean of each channel (channels,) float64, for each of its calls in order."""


@torch.no_grad()
def layer_means(block: nn.Module, reached: Sequence[Arguments]) -> Means:
    """The means of what `block`'s batch norms are given and of what its layers with a bias return."""
    means: Means = {name: [] for name in _adjustable(block)}

    def note(name: str, values: Tensor, axis: int) -> None:
        means[name].append(channel_mean(values, axis))

    with _watched(block, note):
        for args, kwargs in reached:
            block(*args, **kwargs)
            give_back()  # what small results between large ones have left in pieces
    return means


@torch.no_grad()
def correct_means(block: nn.Module, reached: Sequence[Arguments], wanted: Means) -> dict[str, Tensor]:
    """Sets biases and running means so that the means are `wanted` again; returns the new values by name in `block`.

    One forward per batch: each layer sees what the corrected layers before it give. The shift is the mean over calls.
    """
    shifts: Means = {name: [] for name in wanted}

    def shift(name: str, values: Tensor, axis: int) -> Tensor:
        number, mean = len(shifts[name]), channel_mean(values, axis)
        found = wanted[name][number] - mean if number < len(wanted[name]) else torch.full_like(mean, torch.nan)
        shifts[name].append(found)  # NaN of a call without a row, as of an expert that no token is sent to
        found = found.nan_to_num()
        return found.to(values.dtype).view(-1, *[1] * (values.dim() - 1 - axis % values.dim()))

    with _watched(block, shift):
        for args, kwargs in reached:
            block(*args, **kwargs)
            give_back()  # what small results between large ones have left in pieces
    changed: dict[str, Tensor] = {}
    for name, module in _adjustable(block).items():
        known = [shift for shift in shifts[name] if not shift.isnan().any()]
        if not known:
            continue
        total = torch.stack(known).mean(0)
        attribute, sign = ("running_mean", -1) if isinstance(module, _BatchNorm) else ("bias", 1)
        tensor = getattr(module, attribute)
        tensor.data = (tensor.double() + sign * total).to(tensor.dtype)
        changed[f"{name}.{attribute}" if name else attribute] = tensor.data
    return changed


def channel_mean(values: Tensor, axis: int) -> Tensor:
    """Mean over all axes but `axis`: float64 (channels,). Within an example it is summed in the values' own dtype."""
    if values.dim() == 1:
        return values.double()
    channels_first = values.movedim(axis, 1) if values.dim() > 2 else values
    return channels_first.flatten(2).mean(2).double().mean(0) if values.dim() > 2 else values.double().mean(0)


def _adjustable(block: nn.Module) -> dict[str, nn.Module]:
    """Batch norms with statistics, and convolutions and linears with a bias of their own, by name."""
    kinds = (nn.Linear, InputsFirst, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        name: module
        for name, module in block.named_modules()
        if (isinstance(module, _BatchNorm) and module.running_mean is not None)
        or (isinstance(module, kinds) and module.bias is not None)
    }


@contextlib.contextmanager
def _watched(block: nn.Module, look: Callable[[str, Tensor, int], Tensor | None]) -> Iterator[None]:
    """Shows what batch norms are given and what layers return to `look` (name, values, axis of channels), and adds what
    it returns; to what layers return in place, since nobody else has it yet and it may be large."""
    handles = []

    def given(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> tuple | None:
        (values,) = args or kwargs.values()
        added = look(name, values, 1)
        return None if added is None else ((values + added,), {})

    def returned(name: str, module: nn.Module, _: tuple, out: Tensor) -> None:
        added = look(name, out, -1 - len(getattr(module, "kernel_size", ())))
        if added is not None:
            out += added

    for name, module in _adjustable(block).items():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(partial(given, name), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(returned, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
