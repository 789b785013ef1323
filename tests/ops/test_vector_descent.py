"""Coordinate descent over vectors of columns, against an exhaustive search in float64; and what it never does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressor.ops.vector_descent import best_codes, best_scales, decoded, row_losses
from tests.pico import correlated

GROUP = 20


def problem(rows: int, columns: int, dim: int, size: int = 13):
    weight, hessian = correlated(rows, columns)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(size, dim, generator=generator)
    codes = torch.randint(size, (rows, columns // dim), generator=generator)
    scales = weight.abs().mean() * (0.5 + torch.rand(rows, columns // GROUP, generator=generator))
    return weight, hessian, codes, scales, table


def exhaustive(weight, hessian, codes, scales, table, kept=None):
    """Row by row, vector by vector: every codeword is tried in the whole loss."""
    weight, hessian, scales, table = (part.double().numpy() for part in (weight, hessian, scales, table))
    codes, dim = codes.numpy().copy(), table.shape[1]
    for i, row in enumerate(codes):
        size = np.repeat(scales[i], GROUP)
        for j in range(len(row)):
            losses = []
            for k in range(len(table)):
                row[j] = k
                error = table[row].ravel() * size - weight[i]
                allowed = kept is None or not (table[k] != 0)[~kept[i, j * dim : (j + 1) * dim].numpy()].any()
                losses.append(error @ hessian @ error if allowed else np.inf)
            row[j] = int(np.argmin(losses))
    return torch.from_numpy(codes)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_each_vector_goes_to_the_codeword_of_least_loss(dim):
    parts = problem(7, 140, dim)
    assert torch.equal(best_codes(*parts), exhaustive(*parts))


def test_what_was_dropped_stays_dropped():
    weight, hessian, codes, scales, table = problem(6, 80, 2)
    table[::2, 0], table[1::3, 1], table[0] = 0.0, 0.0, 0.0
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    weight = weight * kept
    codes = torch.zeros_like(codes)
    found = best_codes(weight, hessian, codes, scales, table, kept)
    assert torch.equal(found, exhaustive(weight, hessian, codes, scales, table, kept))
    assert (decoded(found, scales, table)[~kept] == 0).all()
    assert (found != 0).any()


def test_scales_are_the_least_squares_solution():
    weight, hessian, codes, scales, table = problem(9, 60, 4)
    codes = best_codes(weight, hessian, codes, scales, table)
    found = best_scales(weight, hessian, codes, scales, table)
    root = np.linalg.cholesky(hessian.double().numpy())
    units = table[codes].flatten(1).double().numpy()
    for i in range(len(weight)):
        columns = np.zeros((60, 3))
        for g in range(3):
            columns[g * GROUP : (g + 1) * GROUP, g] = units[i, g * GROUP : (g + 1) * GROUP]
        exact = np.linalg.lstsq(root.T @ columns, root.T @ weight[i].double().numpy(), rcond=None)[0]
        expected = np.where(exact > 0, exact, scales[i].double().numpy())
        np.testing.assert_allclose(found[i].double().numpy(), expected, rtol=2e-3)


def test_a_group_without_weights_keeps_its_scale():
    weight, hessian, codes, scales, table = problem(3, 40, 2)
    table[0] = 0.0
    codes[1, :10] = 0
    found = best_scales(weight, hessian, codes, scales, table)
    assert found[1, 0] == scales[1, 0]
    assert found.isfinite().all()


def test_no_sweep_raises_the_loss_of_a_row():
    weight, hessian, codes, scales, table = problem(11, 100, 4)
    losses = row_losses(weight, hessian, decoded(codes, scales, table))
    for _ in range(3):
        codes = best_codes(weight, hessian, codes, scales, table)
        after = row_losses(weight, hessian, decoded(codes, scales, table))
        assert (after <= losses * (1 + 1e-5)).all()
        losses = after
