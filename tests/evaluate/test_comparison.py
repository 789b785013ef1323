"""Outputs beside the original's: each figure held against a loop from its definition, and what is said of figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressor.core.errors import DataError, VerificationError
from compressor.evaluate.comparison import evaluate_outputs
from compressor.evaluate.session import ModuleSession
from compressor.report.tables import OUTPUT_COLUMNS, output_rows
from tests.onnx.graphs import save_classifier

LENGTHS = [5, 2, 3]
MASK = np.array([[int(i < length) for i in range(5)] for length in LENGTHS])
TEXT = {"input_ids": np.zeros((3, 5), int), "attention_mask": MASK}


class Given:
    """A session that answers with what was prepared for each batch."""

    def __init__(self, *answers, config=None):
        self.answers, self.config = iter(answers), config or {}

    def run(self, batch):
        return next(self.answers)


def compared(artifact, original, inputs=None, labels=None, **config):
    inputs = inputs or {"x": np.zeros((len(next(iter(original.values()))), 2))}
    return evaluate_outputs(Given(artifact, config=config), [original], [inputs], labels)


def noisy(original, size, seed=1):
    return original + size * np.random.default_rng(seed).normal(size=original.shape)


def softmax(row):
    exponentials = [math.exp(float(value)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_classes_are_compared_with_the_original_and_with_labels(tmp_path):
    directory, weight = save_classifier(tmp_path)
    pixels = np.random.default_rng(8).standard_normal((10, 4)).astype(np.float32)
    right = pixels @ weight
    originals = right.copy()
    originals[0, (right[0].argmax() + 1) % 3] = right.max() + 1  # the original thinks otherwise of one
    labels = right.argmax(1)
    labels[1:3] = (labels[1:3] + 1) % 3
    batches = [{"anything": part} for part in (pixels[:4], pixels[4:8], pixels[8:])]
    references = [{"scores": part} for part in (originals[:4], originals[4:8], originals[8:])]
    found = evaluate_outputs(ModuleSession(directory), references, batches, labels)
    assert found["top1_agreement"] == pytest.approx(0.9)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["original_accuracy"] == pytest.approx(0.7)
    difference = np.abs(right - originals)
    assert found["max_relative_error"] == pytest.approx(difference.max() / np.abs(originals).max(), rel=1e-5)
    assert found["mean_relative_error"] == pytest.approx(difference.mean() / np.abs(originals).max(), rel=1e-4)
    divergences = [
        sum(p * math.log(p / q) for p, q in zip(softmax(b), softmax(a), strict=True))
        for a, b in zip(right, originals, strict=True)
    ]
    assert found["kl_divergence"] == pytest.approx(np.mean(divergences), rel=1e-5)
    assert "relative_error" not in found  # of classes it is told, and no gate


def test_sentence_embeddings_leave_padding_out():
    hidden, original = np.random.default_rng(4).standard_normal((2, 3, 5, 4))
    found = compared({"last_hidden_state": hidden}, {"last_hidden_state": original}, TEXT)
    cosines = []
    for row, length in enumerate(LENGTHS):
        a, b = hidden[row, :length].mean(0), original[row, :length].mean(0)
        cosines.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    assert found["cosine"] == pytest.approx(sum(cosines) / 3)
    assert found["least_cosine"] == pytest.approx(min(cosines))
    assert "top1_agreement" not in found


def test_the_classes_of_tokens_leave_padding_out():
    original = np.random.default_rng(4).standard_normal((3, 5, 4))
    artifact = original.copy()
    artifact[1, 3] = original[1, 3, ::-1] * 9  # padding
    assert compared({"logits": artifact}, {"logits": original}, TEXT)["top1_agreement"] == 1
    wrong = int(original[1, 1].argmin())
    artifact[1, 1, wrong] += 99
    found = compared({"logits": artifact}, {"logits": original}, TEXT)
    assert found["top1_agreement"] == pytest.approx(1 - 1 / sum(LENGTHS))
    assert found["outputs"]["logits"]["n_compared"] == sum(LENGTHS)


def test_a_span_is_compared_among_the_positions_of_its_text():
    original = {name: np.random.default_rng(4).standard_normal((3, 5)) for name in ("start_logits", "end_logits")}
    artifact = {name: values.copy() for name, values in original.items()}
    artifact["start_logits"][1, 4] = 99  # padding
    assert compared(artifact, original, TEXT)["top1_agreement"] == 1
    artifact["end_logits"][0] = -artifact["end_logits"][0]
    found = compared(artifact, original, TEXT)
    assert found["top1_agreement"] == pytest.approx(2 / 3)
    assert found["worst"]["top1_agreement"] == "end_logits"
    assert found["outputs"]["start_logits"]["agreement"] == 1


def test_a_single_value_is_judged_by_its_error_and_never_by_agreement():
    original = np.random.default_rng(0).normal(size=(50, 1)) + 3
    found = compared({"output": original * 1.28}, {"output": original})
    assert found["relative_error"] == pytest.approx(0.28)
    assert "top1_agreement" not in found


def test_one_logit_is_judged_by_its_error_and_its_side():
    original = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    artifact = np.array([[-2.0], [0.5], [1.0], [2.0]])
    found = compared({"logits": artifact}, {"logits": original}, TEXT | {"input_ids": np.zeros((4, 5), int)})
    assert found["top1_agreement"] == 0.75
    assert found["relative_error"] == pytest.approx(1.5 / math.sqrt(10))


def test_scores_that_are_halved_have_no_agreement_and_half_the_error():
    original = np.random.default_rng(0).uniform(0.6, 0.9, (5, 7))
    found = compared({"output": original / 2}, {"output": original})
    assert found["relative_error"] == pytest.approx(0.5)
    assert found["top1_agreement"] == 0


def test_every_output_counts_and_the_worst_is_named():
    generator = np.random.default_rng(0)
    original = {"pred_logits": generator.normal(size=(9, 7, 4)), "pred_boxes": generator.uniform(size=(9, 7, 4))}
    artifact = {"pred_logits": original["pred_logits"], "pred_boxes": 1.1 * original["pred_boxes"]}
    found = compared(artifact, original)
    assert found["top1_agreement"] == 1
    assert found["relative_error"] == pytest.approx(0.1)
    assert found["worst"]["relative_error"] == "pred_boxes"
    assert found["worst"]["max_relative_error"] == "pred_boxes"


def test_integers_are_the_same_or_not():
    original = np.arange(10)
    assert compared({"count": original}, {"count": original})["top1_agreement"] == 1
    assert compared({"count": np.minimum(original, 7)}, {"count": original})["top1_agreement"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("artifact", "original", "note"),
    [
        (np.eye(2)[[0] * 9], np.eye(2)[[0] * 9], "gives the same class all 9 times: agreement could hardly fail"),
        (
            np.eye(3)[[1] * 9],
            np.eye(3)[[0] * 8 + [1]],
            "agrees less often than always the commonest class would, 0.889",
        ),
        (np.zeros((9, 1)), np.arange(9.0)[:, None], "is no nearer to the original than zeros would be"),
        (99.9 + np.zeros((2, 1)), np.array([[100.1], [99.9]]), "differ by 0.1% of their size only; beside that the"),
    ],
)
def test_a_figure_that_could_hardly_fail_and_an_artifact_of_no_use_are_said_so(artifact, original, note):
    (found,) = compared({"output": artifact}, {"output": original})["outputs"].values()
    assert note in "; ".join(found["notes"])


def test_labels_that_ignore_some_tokens_count_the_others():
    original = np.random.default_rng(4).standard_normal((3, 5, 4))
    labels = np.where(np.arange(15).reshape(3, 5) % 2, -100, original.argmax(-1))
    found = compared({"logits": original}, {"logits": original}, TEXT, labels)
    assert found["accuracy"] == found["original_accuracy"] == 1


def test_labels_that_fit_no_output_are_said_so_and_end_nothing():
    original = np.random.default_rng(4).standard_normal((3, 8))
    found = compared({"image_embeds": original}, {"image_embeds": original}, labels=np.zeros((3,), int))
    assert "fit no output" in found["labels"] and "accuracy" not in found


def test_a_text_classifier_is_judged_in_batches_of_any_length():
    batches = [{"input_ids": np.zeros((2, n), int)} for n in (7, 3)]
    original = [{"logits": np.random.default_rng(n).normal(size=(2, 4))} for n in (7, 3)]
    found = evaluate_outputs(Given(*original), original, batches)
    assert found["top1_agreement"] == 1 and found["n_examples"] == 4


def test_renamed_outputs_are_paired_in_order_and_missing_ones_refused():
    values = np.random.default_rng(0).normal(size=(4, 3))
    assert compared({"renamed": values}, {"scores": values})["top1_agreement"] == 1
    with pytest.raises(VerificationError, match="the artifact has a; the original has a, b"):
        compared({"a": values}, {"a": values, "b": values})
    with pytest.raises(VerificationError, match="has shape"):
        compared({"a": values[:, :2]}, {"a": values})


def test_an_artifact_that_overflows_is_refused():
    values = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(VerificationError, match="12 of the artifact's values are NaN or infinite"):
        compared({"a": values * np.inf}, {"a": values})


def test_other_numbers_of_batches_are_an_error():
    values = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(DataError, match="another number of batches"):
        evaluate_outputs(Given({"a": values}), [{"a": values}] * 2, [{"x": values}])
    with pytest.raises(DataError, match="nothing to compare"):
        evaluate_outputs(Given(), [], [])


def test_the_table_has_agreement_divergence_and_error_of_a_plain_network():
    original = np.random.default_rng(2).normal(size=(40, 5))
    quality = compared({"logits": noisy(original, 0.5)}, {"logits": original})
    [row] = output_rows(quality)
    shown, found = dict(zip(OUTPUT_COLUMNS, row, strict=True)), quality["outputs"]["logits"]
    assert (shown["output"], shown["of"], shown["compared"]) == ("logits", "classes", "40")
    for column, key in (("agreement", "agreement"), ("KL", "kl_divergence"), ("relative error", "relative_error")):
        assert float(shown[column]) == pytest.approx(found[key], rel=1e-3)
    assert 0 < found["agreement"] < 1


def test_numbers_that_are_regressed_have_their_r_squared():
    original = np.random.default_rng(3).normal(size=(50, 4)) * 0.1 + 5
    quality = compared({"box": noisy(original, 0.05)}, {"box": original})["outputs"]["box"]
    wanted = 1 - ((noisy(original, 0.05) - original) ** 2).sum() / ((original - original.mean(0)) ** 2).sum()
    assert quality["kind"] == "values"
    assert quality["r_squared"] == pytest.approx(wanted)
    assert quality["r_squared"] < 0.9 < 1 - quality["relative_error"]


def test_how_many_scores_above_the_threshold_are_the_same_is_told_beside_the_many_below():
    original = np.where(np.arange(1000).reshape(2, 500) % 10 == 0, 0.9, 0.1)
    found = original.copy()
    found[0, :250:10] = 0.4
    quality = compared({"map": found}, {"map": original})["outputs"]["map"]
    assert (quality["kind"], quality["agreement"]) == ("scores", 0.975)
    assert (quality["n_above"], quality["same_above"]) == (87.5, pytest.approx(2 * 75 / 175))
