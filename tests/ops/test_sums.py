"""Sums that do not depend on the number of threads."""

import subprocess
import sys

import pytest
import torch

from compressor.ops.sums import PART, mean, total


@pytest.mark.parametrize("n", [1, 7, PART, PART + 1, 5 * PART + 3, 70 * PART])
def test_they_are_sums_and_means(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(total(values).double(), values.double().sum(), atol=1e-3)
    assert torch.allclose(mean(values).double(), values.double().mean(), atol=1e-6)


def test_a_short_tensor_has_torchs_own_mean():
    values = torch.randn(40, 30).T
    assert torch.equal(mean(values), values.mean())
    assert mean(torch.zeros(0)).isnan()


def test_they_have_a_gradient():
    values = torch.randn(3, PART, requires_grad=True)
    mean(values).backward()
    assert torch.allclose(values.grad, torch.full_like(values, 1 / values.numel()))


def test_the_number_of_threads_changes_no_bit():
    """In a process of its own: the tests' has one thread, and keeps it."""
    code = """
import torch
from compressor.ops.sums import total
values = torch.randn(300, 1001, generator=torch.Generator().manual_seed(0)).T
found = set()
for threads in (1, 2, 3, 8):
    torch.set_num_threads(threads)
    found.add(float(total(values)))
assert len(found) == 1, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
