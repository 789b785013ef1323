"""The uniform grids against loops in float64 written from their papers, every setting, and what each beats."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressor.core.contract import Statistics
from compressor.core.encoding import describe, restore
from compressor.passes.affine import Affine, hqq_zero
from tests.pico import correlated, output_error

ROWS, COLUMNS = 37, 100
NAMES = {torch.uint8: "U8", torch.float16: "F16"}


def encoded(weight, hessian, **settings):
    return Affine(**settings).encode(weight, Statistics(hessian), torch.Generator())


def error(method: str, rows: int = 96, columns: int = 160, **settings) -> float:
    weight, hessian = correlated(rows, columns)
    return output_error(weight, encoded(weight, hessian, method=method, **settings).decode(), hessian)


ZEROS = ("middle", "half", "learned", "fine")
SETTINGS = list(itertools.product(("rtn", "hqq", "gptq"), (2, 3, 4, 8), (16, 64, "row"), ZEROS, (8, 16)))


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_every_setting_gives_the_parts_that_were_planned(method):
    for _, bits, group, zero, scale_bits in (row for row in SETTINGS if row[0] == method):
        for shape in ((ROWS, COLUMNS), (5, 37)):
            settings = {"bits": bits, "group": group, "zero": zero, "scale_bits": scale_bits}
            weight, hessian = correlated(*shape)
            encoding = encoded(weight, hessian, method=method, **settings)
            spec = Affine(method=method, **settings).spec_for("w", shape, "linear")
            parts = encoding.parts()
            found = {part: (NAMES[tensor.dtype], tuple(tensor.shape)) for part, tensor in parts.items()}
            assert found == spec.parts(*shape), settings
            assert describe(encoding) == spec.describe(*shape), settings
            torch.testing.assert_close(restore(describe(encoding), parts).decode(), encoding.decode(), rtol=0, atol=0)
            least = {2: 0.25, 3: 0.07, 4: 0.02, 8: 4e-4}[bits]
            assert output_error(weight, encoding.decode(), hessian) < least, settings


@pytest.mark.parametrize("zero", ZEROS)
def test_rtn_takes_the_nearest_level(zero):
    weight, _ = correlated(ROWS, COLUMNS)
    encoding = encoded(weight, None, method="rtn", bits=3, group=32, zero=zero)
    scales, decoded = encoding.scales.decode(), encoding.decode()
    for row, column in itertools.product(range(0, ROWS, 5), range(COLUMNS)):
        group = column // 32
        point = float(encoding.zero[row, group]) if zero in ("learned", "fine") else encoding.zero
        levels = [(q - point) * float(scales[row, group]) for q in range(8)]
        value = float(weight[row, column])
        assert abs(float(decoded[row, column]) - value) <= min(abs(level - value) for level in levels) + 1e-7


def naive_gptq(weight, hessian, encoding, damping):
    """Frantar et al., algorithm 1, one column at a time on the grid of `encoding`, H⁻¹ downdated explicitly."""
    weight, hessian = weight.double().clone(), hessian.double()
    columns = weight.shape[1]
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(columns).double())
    scales = encoding.scales.decode().double()
    codes = torch.empty(weight.shape, dtype=torch.int32)
    for j in range(columns):
        scale = scales[:, j // encoding.group]
        codes[:, j] = (weight[:, j] / scale + encoding.zero).round().clamp(0, 2**encoding.bits - 1)
        gap = weight[:, j] - (codes[:, j] - encoding.zero) * scale
        weight -= torch.outer(gap, inverse[j]) / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize(("group", "columns"), [(32, 96), (16, 144), ("row", 100)])
@pytest.mark.parametrize("zero", ["middle", "half"])
def test_gptq_by_the_paper(group, columns, zero):
    weight, hessian = correlated(19, columns)
    encoding = encoded(weight, hessian, method="gptq", bits=3, group=group, zero=zero)
    expected = naive_gptq(weight, hessian, encoding, Affine().damping)
    # A tie that float32 breaks the other way changes the rest of its row.
    assert (encoding.codes == expected).float().mean() > 0.97


def naive_hqq(groups, scale, zero, bits, iterations):
    """Badri and Shaji, equations of the half-quadratic solver, value by value."""
    groups, scale, zero = groups.double(), scale.double(), zero.double().clone()
    beta = 10.0
    for _ in range(iterations):
        for row in range(len(groups)):
            total = 0.0
            s, z = float(scale[row]), float(zero[row])
            for value in groups[row].tolist():
                q = min(max(round(value / s + z), 0), 2**bits - 1)
                gap = value - s * (q - z)
                shrunk = max(abs(gap) - (abs(gap) + 1e-12) ** -0.3 / beta, 0.0) * (1 if gap > 0 else -1)
                total += q - (value - shrunk) / s
            zero[row] = total / groups.shape[1]
        beta *= 1.01
    return zero


def heavy_tailed(rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(rows, size, generator=generator) + (torch.rand(rows, size, generator=generator) > 0.95) * 4.0


def test_the_zero_of_hqq_by_its_equations():
    groups = heavy_tailed(5, 33).double()
    scale = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 7
    zero = (-groups.amin(1, keepdim=True) / scale).round()
    found = hqq_zero(groups, scale, zero, 3)
    torch.testing.assert_close(found, naive_hqq(groups, scale, zero, 3, 20), rtol=1e-9, atol=1e-9)
    assert not torch.equal(found, zero)


def test_gptq_beats_rounding():
    for bits in (2, 3, 4):
        assert error("gptq", bits=bits) < 0.75 * error("rtn", bits=bits)


def test_a_searched_scale_beats_the_largest_value():
    weight, hessian = correlated(96, 160)
    decoded = encoded(weight, None, method="rtn", bits=3, group=32).decode()
    groups = weight.view(96, 5, 32)
    scale = groups.abs().amax(2, keepdim=True) / 3.5
    plain = ((groups / scale + 3.5).round().clamp(0, 7) - 3.5) * scale
    assert output_error(weight, decoded, hessian) < output_error(weight, plain.view_as(weight), hessian)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_a_learned_zero_follows_weights_that_are_off_centre(method):
    weight, hessian = correlated(48, 96)
    weight = weight + 0.05
    losses = {
        zero: output_error(weight, encoded(weight, hessian, method=method, bits=3, zero=zero).decode(), hessian)
        for zero in ("middle", "half", "learned")
    }
    assert losses["learned"] < 0.5 * min(losses["middle"], losses["half"])


def test_where_the_zero_lies():
    weight, hessian = correlated(ROWS, COLUMNS)
    points = {zero: encoded(weight, hessian, bits=3, zero=zero).zero for zero in ("middle", "half", "learned")}
    assert (points["middle"], points["half"]) == (4.0, 3.5)
    assert points["learned"].shape == (ROWS, 2)
    assert (points["learned"] >= 0).all()
    assert (points["learned"] <= 7).all()


def test_finer_groups_and_more_bits_lose_less():
    assert error("gptq", bits=3) < error("gptq", bits=2)
    assert error("gptq", bits=2, group=16) < error("gptq", bits=2, group="row")


def test_damping_matters():
    weight, hessian = correlated(ROWS, COLUMNS)
    codes = [encoded(weight, hessian, method="gptq", damping=damping).codes for damping in (0.01, 1.0)]
    assert not torch.equal(*codes)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_zeros_and_dead_inputs_are_encoded(method):
    weight, hessian = correlated(ROWS, COLUMNS)
    hessian[3] = hessian[:, 3] = 0.0
    weight[4] = 0.0
    decoded = encoded(weight, hessian, method=method).decode()
    assert decoded.isfinite().all()
    assert decoded[4].abs().max() < 1e-3


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("zero", ZEROS)
def test_sweeps_behind_error_feedback_lower_the_output_error(zero, scale_bits):
    weight, hessian = correlated(96, 160)
    settings = {"method": "gptq", "bits": 3, "group": 32, "zero": zero, "scale_bits": scale_bits}
    lost = [
        output_error(weight, encoded(weight, hessian, sweeps=sweeps, **settings).decode(), hessian)
        for sweeps in (0, 1, 4)
    ]
    assert lost[2] <= lost[1] < 0.97 * lost[0]


def test_sweeps_keep_what_was_dropped():
    weight, hessian = correlated(ROWS, COLUMNS)
    mask = weight.abs() > weight.abs().median()
    own = Affine(method="gptq", bits=3, group=32, zero="learned", scale_bits=8, sweeps=2)
    decoded = own.encode(weight * mask, Statistics(hessian, kept=mask), torch.Generator()).decode()
    assert not decoded[~mask].any() and decoded[mask].any()


def test_sweeps_are_of_gptq_alone():
    with pytest.raises(ValueError, match="sweeps are behind gptq, and method is rtn"):
        Affine(method="rtn", sweeps=2)
