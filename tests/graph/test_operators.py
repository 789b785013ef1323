"""Branches that can be erased: what is erased and what is zero compute the same, and nothing that stays is cut off."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.graph.operators import find_branches
from compressor.graph.surgery import predicted_parameters, remove_units, zero_units
from tests.graph.test_surgery import called
from tests.graph.zoo import ZOO, build

WHOLE = torch.zeros(1, dtype=torch.long)
FOUND = {
    "resnet": 5, "resnext": 5, "vgg": 0, "mobilenet_v2": 1, "mobilenet_v3": 1, "efficientnet_lite": 0, "densenet": 0,
    "unet": 0, "convnext": 3, "vit": 4, "swin": 3, "bert": 4, "t5": 10, "llama": 4, "gpt2": 4, "recurrent": 0,
    "towers": 0, "custom": 0,
}  # fmt: skip
"""Branches of the zoo's networks: two blocks of attention and MLP are four, a projected shortcut is one beside its
block; efficientnet_lite has no shortcut, densenet and unet concatenate."""


@pytest.mark.parametrize("name", ZOO)
def test_erased_is_zero(name):
    module, example = build(name), ZOO[name][1]
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    branches = find_branches(module, example)
    assert len(branches.operators) == FOUND[name]
    for first in range(2):
        gone = []
        for operator in branches.operators[first::2]:
            if branches.connected([*gone, operator]):
                gone.append(operator)
        masked = copy.deepcopy(module)
        for operator in gone:
            zero_units(masked, operator, WHOLE)
        removal = dict.fromkeys(gone, WHOLE)
        smaller = remove_units(module, removal)
        n = sum(parameter.numel() for parameter in smaller.parameters())
        assert n == predicted_parameters(module, removal)
        assert bool(gone) == (n < sum(p.numel() for p in module.parameters()))
        wanted, found = called(masked, example), called(smaller, example)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert bool(gone) != torch.allclose(wanted, called(module, example))
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} of the original changed"


class Sums(nn.Module):
    """(a(x) + b(x)) and a gate, a shared layer and a branch that is read twice, each added to what came before."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "gate", "shared", "twice", "inner", "outer", "head"):
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.b(x)
        x = x + torch.sigmoid(self.gate(x))
        x = x + self.shared(self.shared(x).relu())
        y = self.twice(x)
        x = x + y * y.mean()
        y = self.inner(x) + x.tanh()
        x = x + self.outer(y)
        return self.head(x) * self.shared(x)


def test_a_branch_is_what_is_read_for_one_sum_only():
    torch.manual_seed(0)
    found = find_branches(Sums().eval(), (torch.randn(3, 6),))
    # shared is read elsewhere as well; of gate, without its weights, a half is left
    assert {operator.name for operator in found.operators} == {"a", "b", "gate", "twice", "inner", "inner to outer"}


def test_what_stays_is_fed():
    """By a walk over all paths, for every choice of branches."""
    torch.manual_seed(0)
    module, example = Sums().eval(), (torch.randn(3, 6),)
    found = find_branches(module, example)
    names = {operator.name: operator for operator in found.operators}
    assert not found.connected([names["a"], names["b"]])
    assert found.connected([names["a"], names["inner"]])
    n_kept = 0
    for size in range(len(names) + 1):
        for gone in itertools.combinations(found.operators, size):
            kept = found.connected(gone)
            assert kept == (not {"a", "b"} <= {operator.name for operator in gone})
            if kept:
                n_kept += 1
                smaller = remove_units(module, dict.fromkeys(gone, WHOLE))
                assert called(smaller, example).shape == (3, 6)
    assert n_kept == 48


def test_both_branches_of_a_projected_block_do_not_go_together():
    module, example = build("resnet"), ZOO["resnet"][1]
    found = find_branches(module, example)
    block, shortcut = found.operators[:2]
    assert shortcut.name == "layers.0.shortcut.0 to 1"
    assert found.connected([block])
    assert found.connected([shortcut])
    assert not found.connected([block, shortcut])
    assert not found.connected(found.operators)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Parametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        for layer in (self.second, self.head):
            parametrize.register_parametrization(layer, "weight", Halved())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.second(self.first(x).relu()))


def test_a_branch_of_parametrised_layers_goes_with_what_they_are_made_of():
    torch.manual_seed(0)
    module, example = Parametrised().eval(), (torch.randn(3, 6),)
    (found,) = find_branches(module, example).operators
    assert {member.tensor for member in found.members} == {
        "first.weight", "first.bias", "second.parametrizations.weight.original",
    }  # fmt: skip
    smaller = remove_units(module, {found: WHOLE})
    assert sum(parameter.numel() for parameter in smaller.parameters()) == 14
    torch.testing.assert_close(called(smaller, example), module.head(example[0]))
