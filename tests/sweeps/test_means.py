"""Biases and running means that make up for what rounding did to the means of layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compressor.sweeps.means import channel_mean, correct_means, layer_means
from tests.pico import ResNet, lively


def coarse(module: nn.Module) -> nn.Module:
    """A copy whose weights are rounded to a coarse grid, which moves every mean."""
    rounded = copy.deepcopy(module)
    for parameter in rounded.parameters():
        if parameter.dim() > 1:
            step = parameter.data.abs().max() / 3
            parameter.data = (parameter.data / step).round() * step
    return rounded


def reached(n: int, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [((1 + torch.randn(8, 3, 12, 12, generator=generator),), {}) for _ in range(n)]


@torch.no_grad()
def distance(module: nn.Module, other: nn.Module, seed: int = 9) -> float:
    images = reached(1, seed)[0][0][0]
    return float((module(images) - other(images)).mean(0).norm())


@pytest.mark.parametrize("n_batches", [1, 3])
def test_the_means_of_all_layers_are_the_originals_again(n_batches):
    original = lively(ResNet(), 0)
    rounded, batches = coarse(original), reached(n_batches)
    wanted = layer_means(original, batches)
    before = distance(rounded, original)
    changed = correct_means(rounded, batches, wanted)
    for name, found in layer_means(rounded, batches).items():
        mean, aim = torch.stack(found).mean(0), torch.stack(wanted[name]).mean(0)
        if name.endswith(("norm1", "norm2")):  # what these are given keeps its shift: their running mean follows
            mean, aim = (
                mean - rounded.get_buffer(f"{name}.running_mean"),
                aim - original.get_buffer(f"{name}.running_mean"),
            )
        torch.testing.assert_close(mean, aim, rtol=0, atol=1e-5 if n_batches == 1 else 0.03)
    assert distance(rounded, original) < before / 5, "on other images as well"
    assert "blocks.0.norm1.running_mean" in changed
    assert {"stem.bias", "depthwise.bias", "head.bias"} <= changed.keys()


def test_an_exact_network_is_left_as_it_is():
    original = lively(ResNet(), 0)
    copied, batches = copy.deepcopy(original), reached(2)
    correct_means(copied, batches, layer_means(original, batches))
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(copied.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_no_hook_is_left_behind_and_weights_stay():
    original = lively(ResNet(), 0)
    rounded = coarse(original)
    weights = {name: tensor.clone() for name, tensor in rounded.named_parameters() if tensor.dim() > 1}
    correct_means(rounded, reached(1), layer_means(original, reached(1)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in rounded.modules())
    for name, tensor in weights.items():
        assert torch.equal(rounded.get_parameter(name), tensor)


def test_channels_are_found_by_axis():
    values = torch.arange(24.0).view(2, 3, 4)
    assert channel_mean(values, 1).tolist() == [7.5, 11.5, 15.5]
    assert channel_mean(values, -1).tolist() == [10.0, 11.0, 12.0, 13.0]


def test_layers_that_are_called_twice_get_the_mean_of_both_shifts():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    original = Twice()
    moved, batches = copy.deepcopy(original), [((torch.randn(32, 6),), {})]
    moved.layer.bias.data += 0.5
    correct_means(moved, batches, layer_means(original, batches))
    torch.testing.assert_close(moved.layer.bias, original.layer.bias, rtol=0, atol=1e-5)
