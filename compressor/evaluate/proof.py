"""Whether the artifact computes what the network computes that it was made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.core.errors import VerificationError
from compressor.evaluate.language import log_softmax


@dataclass(frozen=True)
class Proof:
    """Differences over all positions; KL in nats, of the torch model against the artifact."""

    max_relative_error: float
    kl_divergence: float
    top1_agreement: float
    n_positions: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_logits(artifact: np.ndarray, torch_logits: np.ndarray) -> Proof:
    """max|a − b| / max|b| after each position's mean over the vocabulary is taken away, KL divergence and top-1.

    Softmax does not see a constant added to all logits of a position, so neither does the error.

    Args:
        artifact, torch_logits: (…, vocabulary), of one shape.

    Raises:
        VerificationError: The shapes differ, or the artifact's logits are not finite.
    """
    if artifact.shape != torch_logits.shape:
        raise VerificationError(f"logits: the artifact's have shape {artifact.shape}; expected {torch_logits.shape}")
    vocabulary = artifact.shape[-1]
    a, b = artifact.reshape(-1, vocabulary), torch_logits.reshape(-1, vocabulary)
    if not np.isfinite(a).all():
        raise VerificationError(f"logits: {int((~np.isfinite(a)).sum())} of the artifact's are NaN or infinite")
    largest = difference = divergence = 0.0
    agreeing = 0
    for row_a, row_b in zip(a, b, strict=True):
        row_a, row_b = row_a.astype(np.float64), row_b.astype(np.float64)
        centred_a, centred_b = row_a - row_a.mean(), row_b - row_b.mean()
        difference = max(difference, float(np.abs(centred_a - centred_b).max()))
        largest = max(largest, float(np.abs(centred_b).max()))
        log_p = log_softmax(row_b)
        divergence += float((np.exp(log_p) * (log_p - log_softmax(row_a))).sum())
        agreeing += int(row_a.argmax() == row_b.argmax())
    return Proof(difference / (largest or 1.0), divergence / len(a), agreeing / len(a), len(a))
