"""Units as vectors: gathered from every producer, written back, scaled."""

from __future__ import annotations

import torch
from torch import nn

from compressor.graph.groups import find_groups
from compressor.passes.parts.units import Units
from tests.learning.training_case import EXAMPLE, residual


class Transposed(nn.Module):
    """A group whose producer lies along the second dimension, and one of several entries per unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.up(torch.relu(self.first(x)))))


def units_of(module: nn.Module) -> Units:
    return Units(module, [group for group in find_groups(module, {"": EXAMPLE}) if not group.reason])


def test_a_vector_holds_every_entry_that_makes_its_unit():
    module = residual()
    units = units_of(module)
    by_name = {group.name: vectors for group, vectors in zip(units.groups, units.vectors(units.tensors), strict=True)}
    middle = by_name["block.0"]
    assert units.n == 32
    for unit in range(16):
        parts = [module.block[0].weight[unit], module.block[0].bias[unit], module.block[1].weight[unit],
                 module.block[1].bias[unit]]  # fmt: skip
        assert sorted(middle[unit].tolist()) == sorted(torch.cat([part.flatten() for part in parts]).tolist())


def test_what_is_written_is_what_is_read():
    for module in (residual(), Transposed()):
        units = units_of(module)
        before = units.snapshot()
        wanted = [torch.randn(vectors.shape) for vectors in units.vectors(units.tensors)]
        for number, vectors in enumerate(wanted):
            units.write(number, vectors)
        for found, vectors in zip(units.vectors(units.tensors), wanted, strict=True):
            assert torch.equal(found, vectors)
        assert any(
            not torch.equal(before[name], tensor) for name, tensor in module.named_parameters() if name in before
        )


def test_units_are_scaled_and_their_neighbours_left_alone():
    for module in (residual(), Transposed()):
        units = units_of(module)
        before = units.vectors(units.snapshot())
        factors = [torch.ones(group.size) for group in units.groups]
        for values in factors:
            values[1], values[2] = 0.5, 0.0
        units.scale(factors)
        for found, vectors, values in zip(units.vectors(units.tensors), before, factors, strict=True):
            assert torch.equal(found, vectors * values.unsqueeze(1))


def test_a_unit_of_zeros_adds_nothing_to_the_output():
    module = residual()
    with torch.no_grad():
        module.head.weight[:, 3] = 100.0
        units = units_of(module)
        stays = [(torch.arange(group.size) != 3).float() for group in units.groups]
        units.scale(stays)
        first = module(EXAMPLE)
        module.head.weight[:, 3] = -100.0
        assert torch.equal(module(EXAMPLE), first)
