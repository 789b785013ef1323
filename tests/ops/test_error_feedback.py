"""Error feedback against optimal brain quantisation in float64, which updates the inverse Hessian explicitly."""

from __future__ import annotations

import pytest
import torch

from compressor.ops.error_feedback import error_feedback, inverse_factor
from tests.pico import correlated

DAMPING = 0.01


def rounded(columns: torch.Tensor) -> torch.Tensor:
    return (columns / 0.013).round() * 0.013


def damped(hessian: torch.Tensor) -> torch.Tensor:
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def naive_feedback(weight: torch.Tensor, hessian: torch.Tensor, step: int) -> torch.Tensor:
    """Columns J at a time: w_rest −= (w_J − ŵ_J)·(H⁻¹_JJ)⁻¹·H⁻¹_J,rest, then J leaves the inverse."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(damped(hessian))
    chosen = torch.zeros_like(weight)
    for j in range(0, weight.shape[1], step):
        here = list(range(j, min(j + step, weight.shape[1])))
        chosen[:, here] = rounded(weight[:, here])
        pull = torch.linalg.inv(inverse[here][:, here]) @ inverse[here]
        weight -= (weight[:, here] - chosen[:, here]) @ pull
        inverse = inverse - inverse[:, here] @ pull
    return chosen


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize(("columns", "buffer"), [(150, 64), (37, 64), (96, 32)])
def test_it_is_optimal_brain_quantisation(step, columns, buffer):
    weight, hessian = correlated(11, columns)
    hessian[5] = hessian[:, 5] = 0.0  # an input that is always zero
    factor = inverse_factor(hessian.double(), DAMPING)

    def quantise(_, current, factor_jj):
        return rounded(current[:, : len(factor_jj)])

    found = error_feedback(weight.double(), factor, step, quantise, buffer)
    torch.testing.assert_close(found, naive_feedback(weight, hessian, step), rtol=0, atol=1e-9)


@pytest.mark.parametrize("step", [1, 4])
def test_the_local_errors_add_up_to_the_loss(step):
    weight, hessian = correlated(6, 50)
    factor = inverse_factor(hessian.double(), DAMPING)
    local = []

    def quantise(_, current, factor_jj):
        values = rounded(current[:, : len(factor_jj)])
        local.append(((current[:, : len(factor_jj)] - values) @ torch.linalg.inv(factor_jj)).pow(2).sum())
        return values

    error = weight.double() - error_feedback(weight.double(), factor, step, quantise, 20)
    torch.testing.assert_close(sum(local), ((error @ damped(hessian)) * error).sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [1, 37])
def test_the_factor_is_of_the_inverse_and_the_hessian_stays_as_it_is(size):
    hessian = correlated(3, size)[1].float()
    before = hessian.clone()
    factor = inverse_factor(hessian, DAMPING).double()
    assert torch.equal(hessian, before)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped(hessian), torch.eye(size).double(), rtol=0, atol=1e-3)


def test_the_quantiser_sees_the_rest_of_its_buffer():
    weight, hessian = correlated(3, 40)
    seen = []

    def quantise(start, current, factor_jj):
        seen.append((start, current.shape[1], len(factor_jj)))
        return current[:, : len(factor_jj)]

    error_feedback(weight, inverse_factor(hessian, DAMPING), 4, quantise, 16)
    assert seen[:5] == [(0, 16, 4), (4, 12, 4), (8, 8, 4), (12, 4, 4), (16, 16, 4)]
    assert seen[-1] == (36, 4, 4)


def test_feedback_beats_rounding():
    weight, hessian = correlated(20, 90)
    found = error_feedback(weight, inverse_factor(hessian, DAMPING), 1, lambda _, current, __: rounded(current[:, :1]))
    errors = [weight - found, weight - rounded(weight)]
    mine, naive = (float(((error @ hessian) * error).sum()) for error in errors)
    assert mine < 0.8 * naive


def test_the_factor_is_of_the_damped_inverse():
    hessian = correlated(1, 30)[1].double()
    hessian[7] = hessian[:, 7] = 0.0
    factor = inverse_factor(hessian, DAMPING)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped(hessian)), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(factor, factor.triu(), rtol=0, atol=0)
    assert hessian[7, 7] == 0  # the caller's own is left alone


def test_a_slightly_indefinite_hessian_is_damped_further():
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalues 2.05 and −0.05
    assert inverse_factor(hessian, DAMPING).isfinite().all()


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="are the calibration activations finite"):
        inverse_factor(torch.full((3, 3), torch.nan), DAMPING)
