"""Which units go: against a naive search over every number of the lowest."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.ops.selection import lowest, lowest_reaching

SIZES = (5, 8, 3)
COSTS = (3, 1, 10)
"""Of a unit of each group."""


def scores(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator, dtype=torch.float64) for size in SIZES]


def cost(flags: list[torch.Tensor]) -> float:
    return sum(each * int(group.sum()) for each, group in zip(COSTS, flags, strict=True))


def none() -> list[torch.Tensor]:
    return [torch.zeros(size, dtype=torch.bool) for size in SIZES]


def test_the_lowest_come_first_each_group_gives_its_share_and_ties_keep_their_order():
    values = [torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, math.inf, 0.0])]
    assert lowest(values, [3, 3]) == [(1, 2), (0, 1), (0, 2), (1, 0), (0, 0)]
    assert lowest(values, [1, 2]) == [(1, 2), (0, 1), (1, 0)]


@pytest.mark.parametrize("divisible", [1, 2, 3])
@pytest.mark.parametrize("goal", [0, 1, 7, 12, 20, 1000])
def test_as_few_of_the_lowest_as_reach_the_goal(goal, divisible):
    for seed in range(5):
        values, least = scores(seed), [min(size, divisible) for size in SIZES]
        ranking = lowest(values, [size - n for size, n in zip(SIZES, least, strict=True)])
        wanted = None
        for n in range(len(ranking) + 1):
            flags = none()
            for number, size in enumerate(SIZES):
                units = [unit for group, unit in ranking[:n] if group == number]
                while units and (size - len(units)) % divisible:
                    units.pop()  # the highest of them stays
                flags[number][units] = True
            wanted = flags
            if cost(flags) >= goal:
                break
        found = lowest_reaching(values, none(), least, divisible, goal, cost)
        assert [each.tolist() for each in found] == [each.tolist() for each in wanted]


def test_what_is_gone_stays_so_and_counts():
    gone = none()
    gone[1][:4] = True
    found = lowest_reaching(scores(1), gone, [1, 1, 1], 1, 10, cost)
    assert bool(found[1][:4].all())
    assert 10 <= cost(found) < 20
    assert not bool(gone[0].any()), "the argument is left alone"


def test_a_group_keeps_what_it_has_to():
    found = lowest_reaching(scores(2), none(), [2, 8, 1], 1, math.inf, cost)
    assert [int(flags.sum()) for flags in found] == [3, 0, 2]
