"""Uniform grids: codes, and scales that lose less than the plain largest value."""

from __future__ import annotations

import pytest
import torch

from compressor.ops.grids import code, nearest_zero, search_scale

ZEROS = ("middle", "half", "learned", "fine")


def groups_of(shape=(7, 3, 29)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.03 + 0.01


def loss(groups, scale, zero, bits, weights=1.0) -> torch.Tensor:
    """Σ weight·(w − ŵ)² per group, in a loop over the grid's levels."""
    levels = torch.arange(2**bits).double()
    values = scale.double().unsqueeze(-1) * (levels - zero.double().unsqueeze(-1))
    nearest = (groups.double().unsqueeze(-1) - values).abs().min(-1).values
    return (weights * nearest**2).sum(-1, keepdim=True)


def plain(groups, bits, zero):
    """The scale that just reaches the largest value."""
    top = 2**bits - 1
    if zero in ("learned", "fine"):
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / top
        steps = 1 if zero == "learned" else 2 ** (8 - bits)
        return scale, (-low / scale * steps).round() / steps
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if zero == "half":
        scale = torch.maximum(-low, high) / (top / 2)
        return scale, torch.full_like(scale, top / 2)
    scale = torch.where(-low > high, -low, -high) / 2 ** (bits - 1)  # level 0 is the far one: it takes the extreme
    return scale, torch.full_like(scale, 2.0 ** (bits - 1))


def test_codes_are_clipped_and_ties_go_to_even():
    values = torch.tensor([-9.0, -1.0, -0.5, 0.5, 1.5, 9.0])
    assert code(values, torch.ones(1), 2.0, 2).tolist() == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_searched_scale_beats_the_plain_one(bits, zero):
    groups = groups_of()
    found = loss(groups, *search_scale(groups, bits, zero), bits)
    naive = loss(groups, *plain(groups, bits, zero), bits)
    assert (found <= naive * (1 + 1e-6)).all()
    assert found.sum() < naive.sum()


@pytest.mark.parametrize("zero", ZEROS)
def test_unsigned_scales_are_positive_and_no_worse_than_plain(zero):
    groups = groups_of()
    scale, point = search_scale(groups, 3, zero, signed=False)
    assert (scale > 0).all()
    start, centre = plain(groups, 3, zero)
    if zero == "middle":
        start = groups.abs().amax(-1, keepdim=True) / 3  # the extreme may be of either sign: ±3 steps reach it
    assert loss(groups, scale, point, 3).sum() < loss(groups, start, centre, 3).sum()


def test_a_signed_middle_uses_the_level_that_an_unsigned_one_leaves_idle():
    groups = groups_of()
    signed = loss(groups, *search_scale(groups, 2, "middle"), 2).sum()
    assert signed < loss(groups, *search_scale(groups, 2, "middle", signed=False), 2).sum()


def test_fine_zero_points_are_bytes_over_the_range_of_codes():
    points = torch.tensor([-1.0, 0.04, 7.4, 15.96, 99.0])
    assert nearest_zero(points, 4, "fine").tolist() == [0.0, 1 / 16, 7 + 6 / 16, 255 / 16, 255 / 16]
    assert nearest_zero(points, 2, "fine").tolist() == [0.0, 3 / 64, 255 / 64, 255 / 64, 255 / 64]
    assert nearest_zero(points, 4, "learned").tolist() == [0.0, 0.0, 7.0, 15.0, 15.0]


def test_a_grid_from_the_least_to_the_largest_weight_is_found_again():
    """As of files whose groups were rounded to d·q + m, m no multiple of d."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (50, 32), generator=generator).float()
    codes[:, 0], codes[:, 1] = 0, 15
    step, low = torch.rand(50, 1, generator=generator) + 0.5, -10 * torch.rand(50, 1, generator=generator)
    groups = step * codes + low
    lost = {zero: loss(groups, *search_scale(groups, 4, zero), 4).sum() for zero in ("learned", "fine")}
    assert lost["fine"] < 0.01 * lost["learned"]
    assert lost["fine"] <= 50 * 32 * (1.5 / 32) ** 2 / 3 * 1.5  # a zero point is off by less than 1/32 step


def test_heavier_columns_are_kept_better():
    groups = groups_of()
    weights = torch.ones(29)
    weights[:5] = 100.0
    weighted, even = (search_scale(groups, 2, "half", emphasis) for emphasis in (weights, 1.0))
    assert loss(groups, *weighted, 2, weights).sum() < loss(groups, *even, 2, weights).sum()


@pytest.mark.parametrize("zero", ZEROS)
def test_a_group_of_zeros_has_a_scale(zero):
    scale, point = search_scale(torch.zeros(2, 5), 4, zero)
    assert (scale > 0).all()
    assert point.isfinite().all()
