"""Trellises: the best path against all paths, states against codes."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressor.ops.states import codes_of, states_of
from compressor.ops.trellis import best_path
from compressor.ops.widths import rows_before

STEPS, DIM = 5, 2


def case(width: int, window: int, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width * 31 + window)
    points = torch.randn(steps, DIM, generator=generator)
    return points, torch.rand(steps, generator=generator) + 0.1, torch.randn(2**window, DIM, generator=generator)


def loss(points: torch.Tensor, weights: torch.Tensor, codewords: torch.Tensor, states: torch.Tensor) -> float:
    gaps = points.double() - codewords.double()[states.long()]
    return float((weights.double() * gaps.square().sum(1)).sum())


@pytest.mark.parametrize(("width", "window"), [(1, 2), (1, 3), (2, 3), (2, 4), (2, 5), (3, 4)])
def test_no_path_is_better_than_the_one_that_is_found(width, window):
    points, weights, codewords = case(width, window)
    found = best_path(points, weights, codewords, width)
    least = float("inf")
    for first in range(2**window):
        for codes in itertools.product(range(2**width), repeat=STEPS - 1):
            states = [first]
            for code in codes:
                states.append((states[-1] << width | code) % 2**window)
            least = min(least, loss(points, weights, codewords, torch.tensor(states)))
    assert loss(points, weights, codewords, found) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize(("width", "window"), [(2, 5), (4, 12), (5, 10), (5, 12), (6, 12), (7, 11)])
def test_codes_and_states_say_the_same(width, window):
    points, weights, codewords = case(width, window, 40)
    columns = [best_path(points.roll(i, 0), weights, codewords, width) for i in range(3)]
    states = torch.stack(columns, 1)
    codes = codes_of(states, width, window)
    assert codes.shape == (40 + rows_before(width, window), 3)
    assert int(codes.max()) < 2**width
    assert torch.equal(states_of(codes, width, window), states.int())


def test_a_step_that_counts_more_is_met_better():
    points, _, codewords = case(2, 4, 60)
    even = best_path(points, torch.ones(60), codewords, 2)
    heavy = torch.ones(60)
    heavy[::7] = 1e4
    favoured = best_path(points, heavy, codewords, 2)

    def error(states: torch.Tensor) -> float:
        return float((points - codewords[states.long()])[::7].square().sum())

    assert error(favoured) < 0.8 * error(even)


def test_a_wider_window_loses_less():
    errors = []
    for window in (4, 6, 8, 10):
        points, _, codewords = case(2, window, 400)
        errors.append(loss(points, torch.ones(400), codewords, best_path(points, torch.ones(400), codewords, 2)))
    assert errors == sorted(errors, reverse=True)


def test_what_is_not_finite_is_refused():
    points, weights, codewords = case(2, 4)
    points[2, 1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        best_path(points, weights, codewords, 2)
