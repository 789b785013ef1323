"""Predictors at worked values, and against their definitions."""

import itertools

import numpy as np
import pytest

from compressor.ops.predictors import kendall, label_scale, latency, one_hot, ridge


def test_ridge_at_its_worked_value():
    weights, bias = ridge(np.array([0.0, 1, 2]), np.array([1.0, 3, 5]), 1)
    assert weights.tolist() == pytest.approx([4 / 3])
    assert bias == pytest.approx(5 / 3)


def test_no_other_weights_have_a_smaller_penalised_error():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(9, 3)), generator.normal(size=9)
    weights, bias = ridge(x, y, 0.7)

    def loss(w: np.ndarray, b: float) -> float:
        return float(((y - x @ w - b) ** 2).sum() + 0.7 * (w**2).sum())

    for change in generator.normal(size=(20, 4)) * 0.01:
        assert loss(weights + change[:3], bias + change[3]) > loss(weights, bias)


def test_what_a_skipped_block_would_choose_is_nothing_in_the_code():
    assert one_hot([1, 2], [2, 3]).tolist() == [0, 1, 0, 0, 1]
    assert one_hot([1, 2], [2, 3], {1}).tolist() == one_hot([1, 0], [2, 3], {1}).tolist() == [0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="choice 1 is 3; expected 0 to 2"):
        one_hot([0, 3], [2, 3])


def test_labels_are_scaled_by_their_largest_power_of_ten_less_one():
    assert label_scale([70.0, 78.8]) == 1.0
    assert label_scale([480.0]) == 10.0
    assert label_scale([0.0]) == 1.0


def test_kendall_counts_pairs_in_order_and_leaves_ties_out():
    a, b = [1, 2, 3, 4, 4], [1, 3, 2, 4, 5]
    pairs = list(itertools.combinations(range(5), 2))
    agreeing = sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs)
    assert kendall(a, b) == pytest.approx(agreeing / np.sqrt(9 * 10))
    assert kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 1], [1, 2]) == 0


def test_a_latency_is_the_base_and_what_the_table_says_of_each_operator():
    table = {("conv", 8): 0.5, ("conv", 16): 1.0, ("gemm", 10): 0.25}
    assert latency(table, [("conv", 8), ("conv", 16), ("conv", 8)], 2.0) == 4.0
    with pytest.raises(ValueError, match="the table has no 'pool'"):
        latency(table, ["pool"], 0.0)
