"""DHSPG against its definition, its worked values, and what it promises on a network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compressor.core.errors import CheckpointError, RecipeError
from compressor.passes.oto import (
    Erasing,
    Oto,
    Projecting,
    dhspg_penalty_range,
    half_space_project,
    penalty,
    redundancy,
)
from compressor.passes.settings.oto import OtoSettings
from tests.learning.training_case import EXAMPLE, one_channel_matters, residual, subject_of, trained


def pairs(*shape: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, g


def dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def test_the_worked_value_of_the_penalty_range():
    smallest, largest = dhspg_penalty_range(torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.0]))
    assert float(smallest) == pytest.approx(0.6)
    assert float(largest) == pytest.approx(5 / 3)


def test_the_penalty_range_by_the_paper():
    x, g = pairs(3, 4, 5)
    smallest, largest = dhspg_penalty_range(x, g)
    assert smallest.shape == largest.shape == (3, 4)
    n_growing = 0
    for a, b, low, high in zip(
        x.view(12, 5).tolist(), g.view(12, 5).tolist(), smallest.flatten().tolist(), largest.flatten().tolist(),
        strict=True,
    ):  # fmt: skip
        product, norm = dot(a, b), math.sqrt(dot(a, a))
        if product >= 0:
            assert (low, high) == (0, math.inf)
            continue
        n_growing += 1
        assert low == pytest.approx(-product / norm, rel=1e-12)
        assert high == pytest.approx(-dot(b, b) * norm / product, rel=1e-12)
        assert low <= high  # Cauchy and Schwarz
    assert 0 < n_growing < 12


def test_within_the_range_the_unit_shrinks_and_the_loss_falls():
    x, g = pairs(200, 6)
    smallest, largest = dhspg_penalty_range(x, g)
    unit = x / x.norm(dim=1, keepdim=True)
    for share, shrinks, falls in ((0.5, True, True), (-0.1, False, True), (1.1, True, False)):
        bounded = torch.where(torch.isfinite(largest), largest, smallest + 1)
        weight = smallest + share * (bounded - smallest)
        step = -(g + weight.unsqueeze(1) * unit)
        growing = torch.isfinite(largest)
        assert bool((((step * x).sum(1) < 0) == shrinks)[growing].all())
        assert bool((((step * g).sum(1) < 0) == falls)[growing].all())


def test_a_unit_of_zeros_has_no_range():
    smallest, largest = dhspg_penalty_range(torch.zeros(2, 3), torch.ones(2, 3))
    assert smallest.tolist() == [0, 0]
    assert largest.tolist() == [math.inf] * 2


@pytest.mark.parametrize(("usual", "amplification", "cap"), [(1e-3, 2.0, 10.0), (1e-2, 20.0, 1000.0), (0.5, 2.0, 4.0)])
def test_the_penalty_by_the_paper(usual, amplification, cap):
    x, g = pairs(40, 6)
    found = penalty(x, g, usual, amplification, cap)
    for a, b, value in zip(x.tolist(), g.tolist(), found.tolist(), strict=True):
        product, norm = dot(a, b), math.sqrt(dot(a, a))
        wanted = usual
        if product < 0:
            low, high = -product / norm, -dot(b, b) * norm / product
            wanted = min(max(amplification * low, usual), cap * usual)
            if wanted >= high:
                wanted = (low + high) / 2
        assert value == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.9])
def test_the_half_space_step_by_the_paper(epsilon):
    x, step = pairs(3, 7, 4)
    trial = x + 0.8 * step
    found = half_space_project(x, trial, epsilon)
    n_zero = 0
    for a, b, c in zip(x.view(21, 4).tolist(), trial.view(21, 4).tolist(), found.view(21, 4).tolist(), strict=True):
        if dot(a, b) < epsilon * dot(a, a):
            assert c == [0, 0, 0, 0]
            n_zero += 1
        else:
            assert c == b
    assert n_zero < 21
    assert epsilon == 0 or n_zero


def test_a_unit_beyond_the_half_space_is_zero_and_one_on_its_edge_is_not():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    trial = torch.tensor([[-0.1, 5.0], [0.0, 5.0], [2.0, 1.0]])
    assert half_space_project(x, trial, 0.0).tolist() == [[0, 0], [0, 5], [2, 1]]
    assert half_space_project(x, trial, torch.tensor([0.0, 0.1, 0.0])).tolist() == [[0, 0], [0, 0], [2, 1]]


def test_redundancy_by_the_paper_over_groups_of_different_sizes():
    first, second = pairs(4, 7), pairs(3, 2, seed=8)
    cosines, inverses = [], []
    for x, g in (first, second):
        for a, b in zip(x.tolist(), g.tolist(), strict=True):
            norm = math.sqrt(dot(a, a))
            cosines.append(dot([-v for v in a], [-v for v in b]) / norm / math.sqrt(dot(b, b)))
            inverses.append(1 / (norm / len(a) + 1e-6))
    lengths = [math.sqrt(sum(v * v for v in values)) for values in (cosines, inverses)]
    wanted = [0.5 * c / lengths[0] + 0.5 * i / lengths[1] for c, i in zip(cosines, inverses, strict=True)]
    found = redundancy([first[0], second[0]], [first[1], second[1]])
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_an_optimizer_that_adapts_its_rates_gets_a_stronger_penalty():
    assert OtoSettings().strength == (1e-3, 2, 10)
    assert OtoSettings(optimizer="AdamW").strength == (1e-2, 20, 1000)
    assert OtoSettings(optimizer="AdamW", penalty=0.5).strength == (0.5, 20, 1000)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "AdamW", "rate": 3e-3}])
def test_the_budget_is_met_and_what_went_computes_as_if_it_were_zero(settings):
    method = Oto(**({"fraction": 0.5, "epochs": 6, "batch": 16, "rate": 0.02} | settings))
    subject, outcome = trained(method)
    torch.testing.assert_close(outcome.module(EXAMPLE), subject.module(EXAMPLE), rtol=1e-4, atol=1e-5)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (subject.module, outcome.module))
    assert 0.4 * before < after <= 0.5 * before
    assert outcome.report["training"][-1]["loss"] < outcome.report["training"][0]["loss"]
    assert outcome.report["set_to_zero_at_the_end"] >= 0


def test_a_strong_penalty_brings_every_redundant_unit_to_zero_by_itself_and_a_weak_one_leaves_it_to_the_end():
    forced = {}
    for strength in (1e-4, 10.0):
        method = Oto(fraction=0.5, of="units", epochs=12, batch=16, penalty=strength, rate=0.05)
        subject = subject_of(residual())
        trainer = subject.trainer(method, None)
        projecting = Projecting(method, subject, trainer.n_steps)
        trainer.train(projecting)
        forced[strength] = projecting.forced
        for gone, x in zip(projecting.gone, projecting.units.vectors(projecting.units.tensors), strict=True):
            assert torch.equal(x.norm(dim=1) == 0, gone)
        assert sum(int(gone.sum()) for gone in projecting.gone) == 16
    assert forced == {1e-4: 16, 10.0: 0}


@pytest.mark.parametrize(("most", "stay"), [(0.9, 2), (0.5, 6), (1.0, 1)])
def test_no_group_loses_more_than_most_of_it_however_redundant_it_is(most, stay):
    method = Oto(fraction=0.3, of="units", most=most)
    projecting = Projecting(method, subject_of(one_channel_matters()), 10)
    (flags,) = projecting.lowest([torch.zeros(12)], math.inf)
    assert int((~flags).sum()) == stay


def test_one_step_is_the_optimizers_the_penaltys_and_the_projection():
    """On a unit each way: naive arithmetic from x, the optimizer's step and the rate."""
    method = Oto(fraction=0.5, of="units", warmup=0.0, pruning=1.0, penalty=0.4, amplification=2.0, cap=10.0)
    subject = subject_of(one_channel_matters())
    projecting = Projecting(method, subject, 10)
    before, rate = projecting.units.snapshot(), 0.05
    x = projecting.units.vectors(before)[0].double()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    projecting.units.write(0, (x - rate * gradient).float())
    projecting.step(0, before, rate)
    found = projecting.units.vectors(projecting.units.tensors)[0]
    for unit in range(12):
        a, g = x[unit], gradient[unit]
        wanted = a - rate * g
        if projecting.redundant[0][unit]:
            product, norm = float(a @ g), float(a.norm())
            weight = 0.4
            if product < 0:
                low, high = -product / norm, -float(g @ g) * norm / product
                weight = min(max(2 * low, 0.4), 4.0)
                weight = (low + high) / 2 if weight >= high else weight
            wanted = wanted - rate * weight * a / norm
            wanted = wanted * (float(wanted @ a) >= 0)
        torch.testing.assert_close(found[unit].double(), wanted, rtol=1e-4, atol=1e-5)
    assert int(projecting.redundant[0].sum()) == 6


class Branched(nn.Module):
    """A stem, two blocks, a sum of two convolutions without a shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
                                   for _ in range(2))  # fmt: skip
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))


def branched() -> nn.Module:
    torch.manual_seed(4)
    return Branched().eval()


@pytest.mark.parametrize("penalty", [1e-4, 100.0])
def test_whole_branches_are_erased_as_the_budget_says(penalty):
    method = Oto(fraction=0.4, epochs=6, batch=16, rate=0.02, erase=True, penalty=penalty)
    subject, outcome = trained(method, branched())
    torch.testing.assert_close(outcome.module(EXAMPLE), subject.module(EXAMPLE), rtol=1e-4, atol=1e-5)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (subject.module, outcome.module))
    assert after <= 0.6 * before
    kept = outcome.report["kept_units"]
    assert {size for _, size in kept.values()} == {1}
    gone = {name for name, (left, _) in kept.items() if not left}
    assert gone
    assert not {"left", "right"} <= gone
    assert sum(left.numel() for left in outcome.module.parameters()) == outcome.report["training"][-1]["parameters"]
    assert (outcome.report["set_to_zero_at_the_end"] > 0) == (penalty < 1)


def test_branches_go_by_score_but_the_last_that_feeds_a_sum_stays():
    erasing = Erasing(Oto(fraction=0.4, erase=True), subject_of(branched()), 10)
    names = [operator.name for operator in erasing.branches.operators]
    order = {"left": 0.0, "right": 1.0, "second.0 to 2": 2.0, "first.0 to 2": 3.0}
    assert set(names) == set(order)
    scores = [torch.tensor([order[name]]) for name in names]
    sizes = {"left": 584, "right": 72, "second.0 to 2": 656, "first.0 to 2": 656}

    def taken(goal: float) -> set[str]:
        return {name for name, flags in zip(names, erasing.lowest(scores, goal), strict=True) if bool(flags)}

    assert taken(sizes["left"]) == {"left"}
    assert taken(sizes["left"] + 1) == {"left", "second.0 to 2"}
    assert taken(math.inf) == {"left", "second.0 to 2", "first.0 to 2"}


def test_what_cannot_be_erased_is_refused_before_the_training():
    with pytest.raises(
        RecipeError, match=r"fraction 0\.95 of the parameters cannot go; 0\.\d+ can, with every sum fed"
    ):
        trained(Oto(fraction=0.95, erase=True), branched())
    with pytest.raises(CheckpointError, match="Sequential: oto can erase nothing of it"):
        trained(Oto(fraction=0.1, erase=True), one_channel_matters())
    with pytest.raises(ValueError, match="branches are of all sizes; write of: parameters"):
        Oto(erase=True, of="units")
