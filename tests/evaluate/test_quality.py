"""Figures of quality, each held against a loop in float64 written from its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressor.core.errors import DataError, VerificationError
from compressor.evaluate.language import evaluate_language
from compressor.evaluate.proof import compare_all, compare_logits

N_WINDOWS, LENGTH, VOCABULARY = 3, 131, 17  # positions cross two boundaries of 64


class Given:
    """A session that answers with logits prepared per window."""

    def __init__(self, windows, logits):
        self.logits_of = {window.tobytes(): values for window, values in zip(windows, logits, strict=True)}

    def logits(self, ids):
        return self.logits_of[ids[0].tobytes()][None]


@pytest.fixture
def case():
    generator = np.random.default_rng(3)
    windows = generator.integers(0, VOCABULARY, (N_WINDOWS, LENGTH))
    original = generator.standard_normal((N_WINDOWS, LENGTH, VOCABULARY)).astype(np.float32) * 4 + 100
    artifact = original + generator.standard_normal(original.shape).astype(np.float32)
    return windows, artifact, original


def probabilities(logits):
    exponentials = [math.exp(float(value) - float(max(logits))) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def by_definition(windows, artifact, original):
    losses, original_losses, divergences, agreements = [], [], [], []
    for window in range(N_WINDOWS):
        for i in range(LENGTH - 1):
            q, p = probabilities(artifact[window, i]), probabilities(original[window, i])
            target = windows[window, i + 1]
            losses.append(-math.log(q[target]))
            original_losses.append(-math.log(p[target]))
            divergences.append(sum(p[v] * math.log(p[v] / q[v]) for v in range(VOCABULARY)))
            agreements.append(q.index(max(q)) == p.index(max(p)))
    means = [sum(values) / len(values) for values in (losses, original_losses, divergences, agreements)]
    return math.exp(means[0]), math.exp(means[1]), means[2], means[3]


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_language_quality_is_its_definition(case, at_a_time):
    windows, artifact, original = case
    reference = (original[start : start + at_a_time] for start in range(0, N_WINDOWS, at_a_time))
    found = evaluate_language(Given(windows, artifact), reference, windows)
    perplexity, original_perplexity, divergence, agreement = by_definition(*case)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-9)
    assert found.original_perplexity == pytest.approx(original_perplexity, rel=1e-9)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-9)
    assert found.top1_agreement == pytest.approx(agreement)
    assert found.ratio == pytest.approx(perplexity / original_perplexity)
    assert (found.n_windows, found.tokens) == (N_WINDOWS, N_WINDOWS * (LENGTH - 1))


def test_a_model_beside_itself_loses_nothing(case):
    windows, _, original = case
    found = evaluate_language(Given(windows, original), original, windows)
    assert (found.kl_divergence, found.top1_agreement, found.ratio) == (0.0, 1.0, 1.0)


def test_without_the_original_only_the_perplexity_is_told(case):
    windows, artifact, _ = case
    found = evaluate_language(Given(windows, artifact), None, windows)
    assert found.perplexity == pytest.approx(by_definition(*case)[0])
    assert found.original_perplexity is found.kl_divergence is found.top1_agreement is found.ratio is None


def test_a_reference_that_ends_early_is_an_error(case):
    windows, artifact, original = case
    with pytest.raises(DataError, match="end after 2 windows; expected 3"):
        evaluate_language(Given(windows, artifact), original[:2], windows)


def test_proof_ignores_a_constant_per_position_and_sees_one_wrong_logit(case):
    _, _, original = case
    original = original.astype(np.float64)
    shifted = original + np.arange(LENGTH)[None, :, None]
    assert compare_logits(shifted, original).max_relative_error < 1e-12
    wrong = original.copy()
    wrong[1, 70, 5] += 1.0
    centred = original - original.mean(-1, keepdims=True)
    found = compare_logits(wrong, original)
    assert found.max_relative_error == pytest.approx((1 - 1 / VOCABULARY) / np.abs(centred).max())
    assert found.kl_divergence > 0 and found.n_positions == N_WINDOWS * LENGTH


def test_proof_refuses_other_shapes_and_what_is_not_finite(case):
    _, artifact, original = case
    with pytest.raises(VerificationError, match="have shape"):
        compare_logits(artifact[:, 1:], original)
    artifact[0, 0, 0] = np.nan
    with pytest.raises(VerificationError, match="1 of the artifact's values are NaN"):
        compare_logits(artifact, original)


def test_the_proof_sees_a_single_value_that_is_off_and_names_the_worst_output():
    logit = np.array([[2.0], [3.0]])
    found = compare_all({"logits": logit * 1.28, "box": logit}, {"logits": logit, "box": logit}, {})
    assert found["max_relative_error"] == pytest.approx(0.28)
    assert found["output"] == "logits" and found["outputs"]["box"]["max_relative_error"] == 0
    assert "top1_agreement" not in found["outputs"]["logits"]  # a single entry is always the largest


def test_the_proof_needs_every_output_of_the_network():
    one, two = {"a": np.ones(3)}, {"a": np.ones(3), "b": np.ones(3)}
    with pytest.raises(VerificationError, match="the artifact has a; the original has a, b"):
        compare_all(one, two, {})


def test_masked_logits_are_minus_infinity_in_both():
    logits = np.array([[1.0, -np.inf, 3.0]])
    assert compare_logits(logits, logits).max_relative_error == 0
    with pytest.raises(VerificationError, match="1 of the artifact's values are NaN"):
        compare_logits(logits, np.array([[1.0, 2.0, 3.0]]))
