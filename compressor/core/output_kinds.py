"""What an output of a network is, by its name, its shape and what the original gives: so is it compared.

    classes      logits (…, classes), or probabilities: agreement of the largest, KL
    tokens       the same of every token that is no padding
    positions    logits of where in a text something begins or ends: agreement of the largest, KL
    scores       independent logits or probabilities, one alone among them: relative error, agreement at the threshold
    values       anything without classes; boxes, images and numbers that are regressed: relative error
    vectors      embeddings, hidden states and those of recurrent networks: cosines
    numbers      integers: the share that is the same

A last axis of one value has no largest entry that could differ: it is never classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Label = Literal["classes", "tokens", "positions", "scores", "values", "vectors", "numbers"]
VECTORS = ("hidden_state", "hidden_states", "embeds", "embeddings", "embedding", "pooler_output", "features", "states")
REGRESSED = ("boxes", "bbox", "box", "landmarks", "keypoints", "points", "offsets", "regression", "depth", "coords")
SPANS = ("start_logits", "end_logits", "start_scores", "end_scores")


@dataclass(frozen=True)
class OutputKind:
    """How an output is compared.

    axis            the classes, or the components of a vector, lie along it
    probabilities   whether classes are probabilities already
    threshold       of scores: on which side of it one lies is what they decide
    masked          whether the second axis are tokens, of which `attention_mask` says which are real
    """

    label: Label
    axis: int = -1
    probabilities: bool = False
    threshold: float | None = None
    masked: bool = False


def kind_of(
    name: str, original: np.ndarray, inputs: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None,
    labels: np.ndarray | None = None,
) -> OutputKind:  # fmt: skip
    """The kind of an output, from what the original gives for one batch.

    Args:
        original: (examples, …).
        inputs: The batch, whose `attention_mask` or `input_ids` tell which outputs are per token.
        config: A transformers model's, which knows regressions and classes that do not exclude each other.
        labels: Classes of the same examples; an output that has their shape, but for one axis, is of classes.
    """
    if original.dtype.kind not in "fc":
        return OutputKind("numbers")
    leaf, shape = name.lower().rpartition(".")[2], original.shape
    real = real_tokens(inputs)
    per_token = real is not None and shape[:2] == real.shape
    axis = 1 if len(shape) == 4 else -1
    several = len(shape) > 1 and shape[axis] > 1
    if leaf.endswith(REGRESSED) or (len(shape) == 2 and "logit" not in leaf and _is_regressed(original, labels)):
        return OutputKind("values")
    if _is_state(name, original, inputs):
        return OutputKind("vectors")
    if leaf in SPANS and len(shape) == 2:
        return OutputKind("positions", masked=per_token)
    if leaf.endswith(VECTORS) and several:
        return OutputKind("vectors", axis, masked=per_token and len(shape) == 3)

    unit = bool(original.size) and float(original.min()) >= 0 and float(original.max()) <= 1
    threshold = 0.5 if unit else 0.0 if "logit" in leaf or "mask" in leaf else None
    problem = (config or {}).get("problem_type")
    single = not several or (per_token and len(shape) == 2) or "mask" in leaf
    if problem == "regression" or (single and threshold is None):
        return OutputKind("values", masked=per_token)
    if single or (problem == "multi_label_classification" and threshold is not None):
        return OutputKind("scores", threshold=threshold, masked=per_token)

    probabilities = unit and bool(np.allclose(original.sum(axis), 1, atol=1e-3))
    if probabilities or _fit(labels, shape, axis) or "logit" in leaf or (len(shape) == 2 and not unit):
        per_token = per_token and len(shape) == 3
        return OutputKind("tokens" if per_token else "classes", axis, probabilities, masked=per_token)
    if unit and len(shape) < 4:
        return OutputKind("scores", threshold=0.5, masked=per_token)
    return OutputKind("vectors", masked=per_token) if len(shape) == 3 else OutputKind("values")


def _is_state(name: str, original: np.ndarray, inputs: Mapping[str, np.ndarray]) -> bool:
    """Whether an output is the state that a step of a recurrent network hands to the next one, which takes it under the
    same name or a shorter one (`state` and `stateN`): no first input, and of the same sizes."""
    taken = [np.shape(array) for given, array in list(inputs.items())[1:] if name.startswith(given)]
    return original.ndim > 2 and any(shape == original.shape for shape in taken)


_ROWS = 4
"""Examples from which on values tell a box from classes."""
_EVEN = 0.05
"""Nats: where all classes are that near to equally likely in every row, none is chosen."""


def _is_regressed(rows: np.ndarray, labels: np.ndarray | None) -> bool:
    """Whether an output (examples, numbers) that no name tells of is a box or points in a picture, by its values.

    Four numbers are a box where in every row the third is beyond the first and the fourth beyond the second, or where
    as logits they would choose no class in any row. An even number between 0 and 1 are points where hardly one is near
    either end, as scores that were learned are.
    """
    n_rows, width = rows.shape
    if labels is not None or n_rows < _ROWS or not np.isfinite(rows).all() or np.allclose(rows.sum(1), 1, atol=1e-3):
        return False
    if width == 4:
        corners = bool((rows[:, 2:] > rows[:, :2]).all())
        shifted = np.exp(rows - rows.max(1, keepdims=True).astype(np.float64))
        shares = shifted / shifted.sum(1, keepdims=True)
        return corners or bool(((shares * np.log(width * np.maximum(shares, 1e-30))).sum(1) < _EVEN).all())
    inside = bool(rows.min() >= 0 and rows.max() <= 1)
    return inside and width >= 4 and width % 2 == 0 and float(((rows > 0.1) & (rows < 0.99)).mean()) > 0.98


def _fit(labels: np.ndarray | None, shape: tuple[int, ...], axis: int) -> bool:
    """Whether labels are classes of an output of this shape."""
    if labels is None or labels.dtype.kind not in "iub":
        return False
    rest = list(shape)
    rest.pop(axis)
    return list(labels.shape[1:]) == rest[1:]


def real_tokens(inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which positions of a batch of texts are no padding: boolean (examples, tokens); None where it is no text."""
    for name, is_mask in (("attention_mask", True), ("input_ids", False)):
        found = np.asarray(inputs.get(name, 0))
        if found.ndim == 2:
            return found != 0 if is_mask else np.ones(found.shape, bool)
    return None
