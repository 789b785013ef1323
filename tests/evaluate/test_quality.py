"""Figures of quality, each held against a loop in float64 written from its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressor.core.errors import DataError, VerificationError
from compressor.data.arrays import Arrays
from compressor.evaluate.embedding import evaluate_embedding
from compressor.evaluate.language import evaluate_language
from compressor.evaluate.modules import evaluate_module
from compressor.evaluate.proof import compare_logits
from compressor.evaluate.session import ModuleSession
from tests.onnx.graphs import save_classifier

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
    with pytest.raises(VerificationError, match="1 of the artifact's are NaN"):
        compare_logits(artifact, original)


def test_sentence_embeddings_leave_padding_out():
    generator = np.random.default_rng(4)
    hidden, original = generator.standard_normal((2, 3, 5, 4))
    lengths = [5, 2, 3]
    mask = np.array([[int(i < length) for i in range(5)] for length in lengths])

    class Encoder:
        def hidden(self, batch):
            return hidden

    found = evaluate_embedding(Encoder(), [original], [{"input_ids": np.zeros((3, 5)), "attention_mask": mask}])
    cosines = []
    for row, length in enumerate(lengths):
        a, b = hidden[row, :length].mean(0), original[row, :length].mean(0)
        cosines.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    assert found.cosine == pytest.approx(sum(cosines) / 3)
    assert found.least_cosine == pytest.approx(min(cosines))
    with pytest.raises(DataError, match="another number of batches"):
        evaluate_embedding(Encoder(), [original, original], [{"input_ids": mask}])


def test_classes_are_compared_with_the_original_and_with_labels(tmp_path):
    directory, weight = save_classifier(tmp_path)
    pixels = np.random.default_rng(8).standard_normal((10, 4)).astype(np.float32)
    right = pixels @ weight
    originals = right.copy()
    originals[0, (right[0].argmax() + 1) % 3] = right.max() + 1  # the original thinks otherwise of one
    labels = right.argmax(1)
    labels[1:3] = (labels[1:3] + 1) % 3
    data = Arrays("test", {"anything": pixels}, labels)
    found = evaluate_module(ModuleSession(directory), [originals[:4], originals[4:8], originals[8:]], data, batch=4)
    assert found.top1_agreement == pytest.approx(0.9)
    assert found.accuracy == pytest.approx(0.8)
    assert found.original_accuracy == pytest.approx(0.7)
    difference = np.abs(right - originals)
    assert found.max_relative_error == pytest.approx(difference.max() / np.abs(originals).max(), rel=1e-5)
    assert found.mean_relative_error == pytest.approx(difference.mean() / np.abs(originals).max(), rel=1e-4)
