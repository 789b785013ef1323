"""HESSO against its definition, its worked values, and what it promises on a network."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.core.errors import RecipeError
from compressor.passes.hesso import Hesso, Shrinking, saliency, shrink_factors, split_budget
from tests.learning.training_case import EXAMPLE, one_channel_matters, subject_of, trained


def by_the_paper(x: list[list[float]], direction: list[list[float]], sizes: list[int]) -> list[float]:
    """The five criteria of each group, each over its length over all groups, a fifth of each."""
    rows = []
    for a, d, size in zip(x, direction, sizes, strict=True):
        norm, other = (math.sqrt(sum(v * v for v in values)) for values in (a, d))
        product = sum(p * q for p, q in zip(a, d, strict=True))
        cosine = product / (norm * other) if norm * other else 0.0
        rows.append([norm, norm / size, cosine + 1, abs(product), 0.5 * product**2])
    lengths = [math.sqrt(sum(row[k] ** 2 for row in rows)) for k in range(5)]
    return [sum(0.2 * row[k] / lengths[k] for k in range(5) if lengths[k]) for row in rows]


def test_saliency_by_the_paper():
    generator = torch.Generator().manual_seed(3)
    x, d = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    x[2], d[4] = 0, 0
    wanted = torch.tensor(by_the_paper(x.tolist(), d.tolist(), [5] * 7), dtype=torch.float64)
    torch.testing.assert_close(saliency(x, d), wanted, rtol=1e-12, atol=0)


def test_saliency_counts_the_entries_of_a_group_and_not_what_fills_its_row():
    generator = torch.Generator().manual_seed(4)
    x, d = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    sizes = [6, 2, 4, 3]
    for i, size in enumerate(sizes):
        x[i, size:], d[i, size:] = 0, 0
    wanted = torch.tensor(by_the_paper(x.tolist(), d.tolist(), sizes), dtype=torch.float64)
    torch.testing.assert_close(saliency(x, d, torch.tensor(sizes)), wanted, rtol=1e-12, atol=0)
    assert not torch.allclose(saliency(x, d), wanted)


def test_a_unit_that_moves_away_from_zero_counts_for_more():
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    away, towards = saliency(x, torch.tensor([[0.3, 0.4], [-0.3, -0.4]])).tolist()
    assert away == pytest.approx(towards + 0.2)  # cos + 1 is 2 and 0, and its length over both 2


def test_nothing_at_all_has_no_saliency_but_that_of_the_cosine():
    torch.testing.assert_close(saliency(torch.zeros(4, 3), torch.zeros(4, 3)), torch.full((4,), 0.1).double())


def test_a_period_of_four_shrinks_to_two_thirds_a_third_and_nothing():
    torch.testing.assert_close(shrink_factors(4).cumprod(0), torch.tensor([2 / 3, 1 / 3, 0]).double())


@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_a_period_ends_at_exactly_zero_in_equal_parts(steps):
    left = shrink_factors(steps).cumprod(0)
    assert len(left) == max(1, steps - 1)
    assert left[-1] == 0
    wanted = [1 - t / max(1, steps - 1) for t in range(1, steps)]
    torch.testing.assert_close(left[: len(wanted)], torch.tensor(wanted, dtype=torch.float64))


def test_the_budget_is_split_with_the_remainder_at_the_end():
    assert split_budget(10, 3) == [3, 3, 4]
    assert split_budget(2, 3) == [0, 0, 2]
    assert split_budget(7, 1) == [7]


@pytest.mark.parametrize("settings", [{}, {"of": "units", "divisible": 4}, {"cycles": 2, "cycle_steps": 3}])
def test_the_budget_is_met_and_what_went_computes_as_if_it_were_zero(settings):
    method = Hesso(fraction=0.5, epochs=6, batch=16, periods=3, rate=0.02, **settings)
    subject, outcome = trained(method)
    masked, smaller = subject.module(EXAMPLE), outcome.module(EXAMPLE)
    torch.testing.assert_close(smaller, masked, rtol=1e-4, atol=1e-5)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (subject.module, outcome.module))
    kept = list(outcome.report["kept_units"].values())
    if settings.get("of") == "units":
        gone = sum(size - left for left, size in kept)
        assert gone >= 0.5 * sum(size for _, size in kept)
        assert all(left % 4 == 0 or left == size for left, size in kept)
    else:
        assert 0.4 * before < after <= 0.5 * before
    assert outcome.report["training"][-1]["parameters"] == after
    assert outcome.report["training"][-1]["loss"] < outcome.report["training"][0]["loss"]


def test_units_shrink_in_a_line_within_their_period_and_then_stay_zero():
    """Without a step of the optimizer, so that all that happens is the shrinking."""
    subject = subject_of(one_channel_matters())
    method = Hesso(fraction=0.5, of="units", periods=2, warmup=0.25, pruning=0.5)
    shrinking = Shrinking(method, subject, 16)
    start = shrinking.units.vectors(shrinking.units.snapshot())[0].norm(dim=1)
    shares = []
    for number in range(16):
        shrinking.step(number, shrinking.units.snapshot(), 0.1)
        norms = shrinking.units.vectors(shrinking.units.tensors)[0].norm(dim=1)
        shares.append((norms / start).sort().values)
    n_first, n_both = 3, 6  # of twelve
    torch.testing.assert_close(shares[3], torch.ones(12))
    for number, left in zip(range(4, 8), (2 / 3, 1 / 3, 0.0, 0.0), strict=True):
        torch.testing.assert_close(shares[number][:n_first], torch.full((n_first,), left))
        torch.testing.assert_close(shares[number][n_first:], torch.ones(12 - n_first))
    torch.testing.assert_close(shares[8][n_first:n_both], torch.full((3,), 2 / 3))
    assert not shares[-1][:n_both].any()
    torch.testing.assert_close(shares[-1][n_both:], torch.ones(6))


def test_cric_keeps_the_unit_that_nothing_replaces_and_plain_hesso_removes_it():
    """Channel 0 is small, and all of the output; the others are large, and nothing reads them."""
    kept = {}
    for cycles in (0, 5):
        method = Hesso(
            fraction=0.5, of="units", epochs=16, batch=16, loss="teacher", distance="mse", rate=0.02, warmup=0.0,
            schedule="constant", rise=0.0, periods=1, pruning=0.3, cycles=cycles, cycle_steps=6,
        )  # fmt: skip
        module = one_channel_matters()
        with torch.no_grad():
            wanted = module(EXAMPLE)
        subject = subject_of(module, method)
        trainer = subject.trainer(method, None)
        shrinking = Shrinking(method, subject, trainer.n_steps)
        trainer.train(shrinking)
        kept[cycles] = not bool(shrinking.gone[0][0])
        with torch.no_grad():
            error = float((subject.module(EXAMPLE) - wanted).norm() / wanted.norm())
        assert (error < 0.2) == bool(cycles), error
        assert sum(int(flags.sum()) for flags in shrinking.gone) == 6
    assert kept == {0: False, 5: True}


def test_after_cric_the_network_is_what_it_was():
    method = Hesso(fraction=0.5, of="units", periods=1, pruning=0.2, warmup=0.0, cycles=2, cycle_steps=5)
    subject = subject_of(one_channel_matters())
    shrinking = Shrinking(method, subject, 40)
    before = {name: tensor.clone() for name, tensor in subject.module.state_dict().items()}
    for number in range(40):
        if shrinking.began is not None:
            break
        shrinking.step(number, shrinking.units.snapshot(), 0.1)
    assert shrinking.began in (5, 10)
    for name, tensor in subject.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.99}, "fraction 0.99 of the parameters cannot go"),
        ({"fraction": 0.9, "of": "units", "divisible": 8}, "with divisible: 8 and most: 0.9; write a smaller fraction"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_anything_is_trained(settings, message):
    with pytest.raises(RecipeError, match=message):
        Shrinking(Hesso(**settings), subject_of(one_channel_matters()), 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"periods": 30}, "10 of 20 steps are for pruning, fewer than periods: 30"),
        ({"cycles": 3, "cycle_steps": 10, "periods": 2}, "take 42 steps, and there are 20; write more epochs"),
    ],
)
def test_a_training_too_short_for_its_schedule_is_refused(settings, message):
    assert message in Hesso(**settings).refuses_steps(20)
    assert Hesso(**settings).refuses_steps(200) is None
