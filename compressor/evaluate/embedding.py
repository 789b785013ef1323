"""Encoders: cosine between the sentence embeddings of the artifact and of the original.

An embedding is the mean of the hidden states of a sentence's tokens, padding left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.core.errors import DataError
from compressor.evaluate.session import EncoderSession


@dataclass(frozen=True)
class EmbeddingQuality:
    """Cosines over all sentences."""

    cosine: float
    least_cosine: float
    n_sentences: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def masked_mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Means of hidden (batch, n, width) over the positions where mask (batch, n) is 1: float64 (batch, width)."""
    weight = mask.astype(np.float64)[..., None]
    return (hidden * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of rows; 0 where a row is zero."""
    length = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(axis=-1) / np.where(length > 0, length, np.inf)


def evaluate_embedding(
    session: EncoderSession, reference_hidden: Iterable[np.ndarray], batches: Iterable[dict[str, np.ndarray]]
) -> EmbeddingQuality:
    """Compares with the original's hidden states (batch, n, width), which come in the order of the batches.

    Raises:
        DataError: There are no batches, or not as many as of the reference.
    """
    cosines = []
    try:
        for batch, original in zip(batches, reference_hidden, strict=True):
            mask = batch.get("attention_mask", np.ones(batch["input_ids"].shape))
            embedding = masked_mean(session.hidden(batch), mask)
            cosines.append(cosine(embedding, masked_mean(np.asarray(original), mask)))
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise DataError(f"reference: has another number of batches than the data; {error}") from error
    if not cosines:
        raise DataError("sentences: found none; give text with at least one sentence")
    every = np.concatenate(cosines)
    return EmbeddingQuality(float(every.mean()), float(every.min()), len(every))
