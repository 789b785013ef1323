"""Sums of xxᵀ against the whole product in float64."""

from __future__ import annotations

import pytest
import torch

from compressor.ops.gram import add_gram, mirror


@pytest.mark.parametrize("columns", [1, 5, 191, 192, 193, 500])
def test_two_batches_add_up_to_the_whole_product(columns):
    rows = torch.randn(23, columns, generator=torch.Generator().manual_seed(columns))
    total = torch.zeros(columns, columns)
    add_gram(total, rows[:10])
    add_gram(total, rows[10:])
    found = mirror(total)
    torch.testing.assert_close(found.double(), rows.double().T @ rows.double(), rtol=1e-5, atol=1e-4)
    assert (found - found.T).abs().max() <= 1e-4


def test_what_lies_above_the_diagonal_is_of_no_account():
    total = torch.arange(400 * 400, dtype=torch.float32).view(400, 400)
    spoilt = total.clone()
    spoilt[:192, 192:] = torch.nan
    assert torch.equal(mirror(spoilt), mirror(total.clone()))
