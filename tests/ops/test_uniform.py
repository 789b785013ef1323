"""Compiled error feedback and descent on uniform grids, against the same in torch, column by column in float64."""

from __future__ import annotations

import pytest
import torch

from compressor.ops import compiled
from compressor.ops.descent import descend
from compressor.ops.error_feedback import error_feedback, inverse_factor
from compressor.ops.grids import code, search_scale
from compressor.ops.uniform import Fitted, Grid, LevelGrid, nearest_stored, stored_scale
from tests.pico import correlated

ROWS, COLUMNS = 9, 96


def naive_fit(grid: Grid, weight, factor, mask, top):
    """Values, scales and zeros of error feedback, a column at a time."""
    emphasis, found = factor.diagonal().pow(-2).float(), []

    def quantise(begin, current, _):
        if begin % grid.group == 0:
            here = emphasis[begin : begin + grid.group]
            group = current[:, : grid.group].float()
            scale, zero = search_scale(group, grid.bits, grid.zero, here, signed=grid.scale_bits == 16)
            found.append((stored_scale(scale, top, grid.scale_bits), zero))
        scale, zero = (each.double() for each in found[-1])
        value = (code(current[:, :1], scale, zero, grid.bits) - zero) * scale
        return value if mask is None else value * mask[:, begin : begin + 1]

    chosen = error_feedback(weight.double(), factor.double(), 1, quantise, grid.group * max(1, 64 // grid.group))
    return chosen, *(torch.cat(parts, 1) for parts in zip(*found, strict=True))


def naive_descent(start: Fitted, hessian, pull, sweeps, mask, scale_bits):
    """Codes and scales, a coordinate and a scale at a time, each by what is lost with all others."""
    hessian, pull, scale = hessian.double(), pull.double(), start.scale.double().clone()
    levels = torch.arange(start.n_levels).double() if start.levels is None else start.levels.double()
    wide = start.zero.double().repeat_interleave(start.group, 1)
    values = levels[start.codes.long()] - wide
    if mask is not None:
        values *= mask
    for _ in range(sweeps):
        for j in range(values.shape[1]):
            pulled = ((values * scale.repeat_interleave(start.group, 1)) @ hessian - pull)[:, j] / hessian[j, j]
            s = scale[:, j // start.group]
            position = (values[:, j] * s - pulled) / s + wide[:, j]
            near = (position.unsqueeze(1) - levels).abs().argmin(1)
            values[:, j] = (levels[near] - wide[:, j]) * (1 if mask is None else mask[:, j])
            if scale_bits is None or (j + 1) % start.group or ((j + 1) % max(64, start.group) and j + 1 < COLUMNS):
                continue
            block = max(64, start.group)
            for at in range(j // block * block // start.group, j // start.group + 1):
                here = slice(at * start.group, (at + 1) * start.group)
                slope = (
                    ((values * scale.repeat_interleave(start.group, 1)) @ hessian - pull)[:, here] * values[:, here]
                ).sum(1)
                bend = ((values[:, here] @ hessian[here, here]) * values[:, here]).sum(1)
                wanted = (scale[:, at] - slope / bend).float().unsqueeze(1)
                change = stored_scale(wanted, start.top, scale_bits).squeeze(1).double() - scale[:, at]
                scale[:, at] += torch.where(2 * change * slope + change**2 * bend < 0, change, 0.0)
    return values + wide, scale


@pytest.mark.parametrize("zero", ["middle", "half", "learned", "fine"])
@pytest.mark.parametrize(("bits", "group", "scale_bits"), [(2, 32, 8), (4, 96, 16), (3, 16, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_feedback_is_what_torch_does_a_column_at_a_time(zero, bits, group, scale_bits, masked):
    weight, hessian = correlated(ROWS, COLUMNS)
    factor = inverse_factor(hessian, 0.01)
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    grid = Grid(bits, group, zero, scale_bits)
    found = grid.fit(weight, mask, factor)
    chosen, scale, point = naive_fit(grid, weight, factor, mask, found.top)
    values = (found.codes.float() - found.zero.repeat_interleave(group, 1)) * found.scale.repeat_interleave(group, 1)
    values = values if mask is None else values * mask  # which half a code does not hold
    # a code at a tie goes either way, and then its whole row: nearly all rows have none
    same = (values - chosen).abs().amax(1) < 1e-4 * weight.abs().max()
    assert same.float().mean() > 0.7
    torch.testing.assert_close(found.scale[same], scale[same], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.zero[same], point[same], rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("scale_bits", [None, 8, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_descent_is_what_torch_does_a_coordinate_at_a_time(levels, scale_bits, masked):
    weight, hessian = correlated(ROWS, COLUMNS)
    hessian = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    stored = scale_bits or 8
    start = (
        LevelGrid(3, 32, stored).fit(weight, torch.ones(COLUMNS), mask)
        if levels
        else Grid(3, 32, "learned", stored).fit(weight, mask)
    )
    pull = weight @ hessian
    found = descend(start, hessian, pull, 2, mask, scale_bits)
    values, scale = naive_descent(start, hessian, pull, 2, mask, scale_bits)
    table = torch.arange(8.0) if found.levels is None else found.levels
    same = (table[found.codes.long()] - values).abs().amax(1) < 1e-3
    assert same.float().mean() > 0.7
    torch.testing.assert_close(found.scale[same].double(), scale[same], rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [8, 16])
def test_one_scale_is_stored_as_many_are(bits):
    scales = torch.logspace(-6, 2, 999).unsqueeze(1) * 1.2345
    top = torch.full((999, 1), 3.0).half()
    steps = top.float() / 255
    pairs = scales[:, 0].numpy(), steps[:, 0].numpy()
    one = [nearest_stored(s, t, bits) for s, t in zip(*pairs, strict=True)]
    assert one == stored_scale(scales, top, bits)[:, 0].tolist()


def test_two_threads_find_what_one_does(monkeypatch):
    monkeypatch.setattr(compiled, "_LEAST_ROWS", 2)
    weight, hessian = correlated(ROWS, COLUMNS)
    factor, found = inverse_factor(hessian, 0.01), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            start = Grid(3, 32, "learned", 8).fit(weight, None, factor)
            found.append(descend(start, hessian, weight @ hessian, 2, None, 8))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].scale, found[1].scale)
