"""Fronts: ranks, crowding and hypervolume at worked values, and against counting by brute force."""

import itertools
import math

import numpy as np
import pytest

from compressor.ops.pareto import crowding, dominates, hypervolume, ranks

POINTS = [(1, 5), (2, 3), (4, 1), (3, 4), (5, 5)]


def test_worked_values():
    assert ranks(POINTS) == [0, 0, 0, 1, 2]
    assert hypervolume(POINTS, (6, 6)) == 17


def test_equal_points_rank_alike_and_do_not_dominate_each_other():
    assert ranks([(1, 1), (1, 1), (2, 2)]) == [0, 0, 1]
    assert not dominates((1, 1), (1, 1))


def test_crowding_is_infinite_at_the_ends_and_a_share_of_the_span_between():
    assert crowding([(0, 4), (1, 2), (4, 0)]) == [math.inf, 4 / 4 + 4 / 4, math.inf]
    assert crowding([(0, 1), (2, 1), (3, 1)])[1] == pytest.approx(1.0)


@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_the_hypervolume_is_the_number_of_cells_that_a_point_dominates(n_axes):
    generator = np.random.default_rng(0)
    points = generator.integers(0, 6, (7, n_axes)).tolist()
    cells = itertools.product(range(6), repeat=n_axes)
    counted = sum(any(all(x <= y for x, y in zip(p, cell, strict=True)) for p in points) for cell in cells)
    assert hypervolume(points, [6] * n_axes) == counted


def test_what_is_not_better_than_the_reference_adds_nothing():
    assert hypervolume([(7, 0), (6, 6)], (6, 6)) == 0
