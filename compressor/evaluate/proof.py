"""Whether the artifact computes what the network computes that it was made from: every output of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.core.errors import VerificationError
from compressor.core.output_kinds import kind_of
from compressor.evaluate.comparison import divergence, paired, refuse_not_finite
from compressor.evaluate.language import log_softmax

CLASSES = ("classes", "tokens", "positions")


@dataclass(frozen=True)
class Proof:
    """Differences over all positions; KL in nats, of the torch model against the artifact, of classes only."""

    max_relative_error: float
    kl_divergence: float | None
    top1_agreement: float | None
    n_positions: int

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def compare_all(
    artifact: Mapping[str, np.ndarray], torch_outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The proof of the output that differs most, in `output` which it is, and where there are several all in `outputs`.

    Raises:
        VerificationError: Outputs or shapes differ, or the artifact's values are not finite.
    """
    found: dict[str, Proof] = {}
    for name, (a, b) in paired(artifact, torch_outputs).items():
        kind = kind_of(name, b, inputs, config)
        if kind.label in CLASSES and not kind.probabilities:
            found[name] = compare_logits(np.moveaxis(a, kind.axis, -1), np.moveaxis(b, kind.axis, -1), name)
        else:
            found[name] = compare_values(a, b, name)
    if not found:
        raise VerificationError("the network has no outputs; expected at least one")
    worst = max(found, key=lambda name: found[name].max_relative_error)
    several = {"outputs": {name: proof.as_dict() for name, proof in found.items()}} if len(found) > 1 else {}
    return found[worst].as_dict() | {"output": worst} | several


def compare_values(artifact: np.ndarray, expected: np.ndarray, name: str = "output") -> Proof:
    """max|a − b| / max|b|, of what has no classes.

    Raises:
        VerificationError: The shapes differ, or the artifact's values are not finite where the other's are.
    """
    _refuse_shape(artifact, expected, name)
    refuse_not_finite(name, artifact, expected)
    finite = np.isfinite(expected)
    a, b = (np.where(finite, each, 0).astype(np.float64) for each in (artifact, expected))
    largest = float(np.abs(b).max(initial=0))
    return Proof(float(np.abs(a - b).max(initial=0)) / (largest or 1.0), None, None, b.size)


def compare_logits(artifact: np.ndarray, torch_logits: np.ndarray, name: str = "logits") -> Proof:
    """max|a − b| / max|b| after each position's mean over the vocabulary is taken away, KL divergence and top-1.

    Softmax does not see a constant added to all logits of a position, so neither does the error.

    Args:
        artifact, torch_logits: (…, vocabulary), of one shape; more than one entry in the vocabulary.

    Raises:
        VerificationError: The shapes differ, or the artifact's logits are not finite.
    """
    _refuse_shape(artifact, torch_logits, name)
    vocabulary = artifact.shape[-1]
    a, b = artifact.reshape(-1, vocabulary), torch_logits.reshape(-1, vocabulary)
    refuse_not_finite(name, a, b)
    largest = difference = total = 0.0
    agreeing = 0
    for row_a, row_b in zip(a, b, strict=True):
        finite = np.isfinite(row_b)
        row_a, row_b = row_a[finite].astype(np.float64), row_b[finite].astype(np.float64)
        if not row_b.size:
            continue
        centred_a, centred_b = row_a - row_a.mean(), row_b - row_b.mean()
        difference = max(difference, float(np.abs(centred_a - centred_b).max()))
        largest = max(largest, float(np.abs(centred_b).max()))
        total += divergence(log_softmax(row_b), log_softmax(row_a))
        agreeing += int(row_a.argmax() == row_b.argmax())
    return Proof(difference / (largest or 1.0), total / len(a), agreeing / len(a), len(a))


def _refuse_shape(artifact: np.ndarray, expected: np.ndarray, name: str) -> None:
    if artifact.shape != expected.shape:
        raise VerificationError(f"{name}: the artifact's have shape {artifact.shape}; expected {expected.shape}")
