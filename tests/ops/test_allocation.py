"""The knapsack against every combination, and what rounding of sizes may cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compressor.ops.allocation import frontier


def drawn(seed: int, n_items: int) -> tuple[list[list[int]], list[list[float]]]:
    """Items of one to five options, of any size and cost."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 6, n_items)
    sizes = [[int(size) for size in generator.integers(0, 60, n)] for n in counts]
    return sizes, [[float(cost) for cost in generator.random(n)] for n in counts]


def by_definition(sizes: list[list[int]], costs: list[list[float]], budget: int) -> float:
    """The least cost of all combinations that fit."""
    fitting = [
        sum(cost[at] for cost, at in zip(costs, chosen, strict=True))
        for chosen in itertools.product(*(range(len(item)) for item in sizes))
        if sum(size[at] for size, at in zip(sizes, chosen, strict=True)) <= budget
    ]
    return min(fitting)


def total(values: list[list], chosen: list[int]) -> float:
    return sum(item[at] for item, at in zip(values, chosen, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_every_budget_gets_its_cheapest_combination(seed):
    sizes, costs = drawn(seed, 1 + seed % 5)
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    found = frontier(sizes, costs, most)
    for budget in range(least, most + 1):
        chosen = found.within(budget)
        assert total(sizes, chosen) <= budget
        assert total(costs, chosen) == pytest.approx(by_definition(sizes, costs, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_budget_for_a_cost_is_the_smallest(seed):
    sizes, costs = drawn(seed, 4)
    found = frontier(sizes, costs, sum(map(max, sizes)))
    wanted = 0.5 * (found.costs[0] + found.costs[-1])
    chosen = found.smallest(wanted)
    assert chosen is not None
    assert total(costs, chosen) <= wanted
    assert by_definition(sizes, costs, int(total(sizes, chosen)) - 1) > wanted or found.costs[0] <= wanted
    assert found.smallest(found.costs[-1] - 0.01) is None


@pytest.mark.parametrize("resolution", [2, 7, 25])
def test_rounded_sizes_never_exceed_the_budget(resolution):
    sizes, costs = drawn(3, 6)
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    found = frontier(sizes, costs, most, resolution)
    for budget in range(least, most + 1, 5):
        chosen = found.within(budget)
        assert total(sizes, chosen) <= budget
        tighter = budget - resolution * (len(sizes) + 1)
        if tighter >= least:
            assert total(costs, chosen) <= by_definition(sizes, costs, tighter) + 1e-12


def test_less_than_the_smallest_options_is_refused():
    with pytest.raises(ValueError, match="the smallest options take 5"):
        frontier([[2, 4], [3]], [[1.0, 0.0], [0.0]], 20).within(4)
