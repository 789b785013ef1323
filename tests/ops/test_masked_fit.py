"""Least squares under a mask, held against a system of equations for each row."""

from __future__ import annotations

import pytest
import torch

from compressor.ops.masked_fit import masked_fit


def case(rows: int = 7, columns: int = 37, n: int = 200, seed: int = 0):
    """A weight, which of it is kept, and a second moment of inputs that lie near a plane."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    kept = torch.rand(rows, columns, generator=generator) < torch.linspace(0.05, 0.95, rows)[:, None]
    return weight, kept, inputs.T @ inputs / n


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_each_row_solves_its_own_equations(damping):
    weight, kept, moment = case()
    found = masked_fit(weight, kept, moment, damping, steps=200, close=1e-6)
    wide = moment.double() + damping * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    for row, places, values in zip(weight.double(), kept, found, strict=True):
        wanted = torch.zeros_like(row)
        wanted[places] = torch.linalg.solve(wide[places][:, places], (wide @ row)[places])
        torch.testing.assert_close(values.double(), wanted, rtol=1e-3, atol=1e-3)
        assert bool((values[~places] == 0).all())


def test_a_few_steps_come_within_a_hundredth_of_the_least_error():
    weight, kept, moment = case(24, 60, 500)

    def error(found: torch.Tensor) -> float:
        return float((((found - weight) @ moment) * (found - weight)).sum())

    least = error(masked_fit(weight, kept, moment, 1e-3, steps=500, close=1e-7))
    assert error(masked_fit(weight, kept, moment, 1e-3, steps=60)) < 1.01 * least
    assert least < 0.7 * error(weight * kept)


def test_what_is_kept_whole_stays_and_inputs_that_never_come_keep_their_weights():
    weight, kept, moment = case()
    assert torch.equal(masked_fit(weight, torch.ones_like(kept), moment), weight)
    moment[3], moment[:, 3] = 0.0, 0.0
    kept[:, 3] = True
    torch.testing.assert_close(masked_fit(weight, kept, moment)[:, 3], weight[:, 3])
    assert torch.equal(masked_fit(weight, kept, torch.zeros_like(moment)), weight * kept)


def test_a_row_of_which_nothing_is_kept_is_zero():
    weight, kept, moment = case()
    kept[2] = False
    found = masked_fit(weight, kept, moment)
    assert bool((found[2] == 0).all())
    assert bool(found.isfinite().all())
