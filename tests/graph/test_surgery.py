"""What is removed and what is masked compute the same, for every network of the zoo and random choices of units."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compressor.core.errors import PassError
from compressor.core.groups import Group
from compressor.graph.groups import find_groups
from compressor.graph.surgery import predicted_parameters, remove_units, zero_units
from tests.graph.zoo import ZOO, build


def called(module: nn.Module, example: tuple | dict) -> Tensor:
    with torch.no_grad():
        output = module(**example) if isinstance(example, dict) else module(*example)
    if isinstance(output, Tensor):
        return output
    return next(
        value for value in (output.values() if isinstance(output, dict) else output) if isinstance(value, Tensor)
    )


def some_units(groups: list[Group], seed: int) -> dict[Group, Tensor]:
    """Up to half of the units of each group that can lose some, drawn."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        if not group.reason:
            n = int(torch.randint(1, max(2, group.size // 2 + 1), (1,), generator=generator))
            found[group] = torch.randperm(group.size, generator=generator)[: min(n, group.size - 1)]
    return found


@pytest.mark.parametrize("name", ZOO)
def test_removed_is_masked(name):
    module, example = build(name), ZOO[name][1]
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    groups = find_groups(module, example)
    for seed in range(2):
        removal = some_units(groups, seed)
        assert removal
        masked = copy.deepcopy(module)
        for group, units in removal.items():
            zero_units(masked, group, units)
        smaller = remove_units(module, removal)
        count = sum(parameter.numel() for parameter in smaller.parameters())
        assert count == predicted_parameters(module, removal) < sum(p.numel() for p in module.parameters())
        wanted, found = called(masked, example), called(smaller, example)
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert not torch.allclose(wanted, called(module, example))
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} of the original changed"


def test_a_group_that_cannot_lose_units_is_refused_by_reason():
    module, example = build("vgg"), ZOO["vgg"][1]
    fixed = next(group for group in find_groups(module, example) if group.reason)
    with pytest.raises(PassError, match="cannot lose units, as it"):
        remove_units(module, {fixed: torch.tensor([0])})


def test_one_unit_of_a_group_has_to_stay():
    module, example = build("vgg"), ZOO["vgg"][1]
    group = next(group for group in find_groups(module, example) if not group.reason)
    with pytest.raises(PassError, match="would lose all of its"):
        remove_units(module, {group: torch.arange(group.size)})
