"""Language models: perplexity of the artifact and of the original, and how far their predictions differ.

Over windows of n tokens, independent of one another, with nothing before them; position i predicts token i + 1, so a
window counts n − 1 predictions.

    perplexity  exp(mean −log q(next token))
    KL          mean Σ_v p(v) · (log p(v) − log q(v)), of the original p and the artifact q, in nats
    top-1       share of predictions where both hold the same token likeliest
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from compressor.core.errors import DataError

_POSITIONS = 64
"""Positions whose distributions are held in float64 at a time."""


class Decoder(Protocol):
    def logits(self, ids: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class LanguageQuality:
    """Means over all predictions; of the original and beside it None where it was not run."""

    perplexity: float
    original_perplexity: float | None
    top1_agreement: float | None
    kl_divergence: float | None
    n_windows: int
    tokens: int

    @property
    def ratio(self) -> float | None:
        """Perplexity over the original's."""
        return None if self.original_perplexity is None else self.perplexity / self.original_perplexity

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass
class Sums:
    """What is added up over predictions."""

    tokens: int = 0
    loss: float = 0.0
    original_loss: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0

    def add(self, logits: np.ndarray, original: np.ndarray | None, targets: np.ndarray) -> None:
        """logits and original (n, vocabulary), targets (n,)."""
        for start in range(0, len(targets), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            log_q, target = log_softmax(logits[part]), targets[part, None]
            self.tokens += len(target)
            self.loss -= float(np.take_along_axis(log_q, target, 1).sum())
            if original is None:
                continue
            log_p = log_softmax(original[part])
            self.original_loss -= float(np.take_along_axis(log_p, target, 1).sum())
            self.divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
            self.agreeing += int((log_q.argmax(1) == log_p.argmax(1)).sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def evaluate_language(
    session: Decoder, reference_logits: Iterable[np.ndarray] | None, windows: np.ndarray
) -> LanguageQuality:
    """The quality of an artifact on windows (n_windows, n), in one pass; one window's logits in memory.

    Args:
        session: Whose `logits(ids)` are judged; a DecoderSession.
        reference_logits: The original's logits in the order of the windows, any number of windows (b, n, vocabulary)
            at a time; None where only the artifact's perplexity is wanted.

    Raises:
        DataError: Windows are shorter than two tokens, or the reference ends early.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise DataError(f"windows: found shape {windows.shape}; expected at least one window of two tokens")
    sums = Sums()
    reference = None if reference_logits is None else _single(reference_logits)
    for number, window in enumerate(windows):
        original = None
        if reference is not None:
            original = next(reference, None)
            if original is None:
                raise DataError(f"reference logits: end after {number} windows; expected {len(windows)}")
        logits = np.asarray(session.logits(window[None]))[0]
        sums.add(logits[:-1], None if original is None else original[:-1], window[1:])
        del logits, original  # before the next window's are made: they are large
    return quality_of(sums, len(windows), reference is not None)


def _single(reference_logits: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for batch in reference_logits:
        array = np.asarray(batch)
        yield from array if array.ndim == 3 else (array,)
        del batch, array


def quality_of(sums: Sums, n_windows: int, with_original: bool) -> LanguageQuality:
    """The means of sums over at least one token, in so many windows."""
    n = sums.tokens
    return LanguageQuality(
        perplexity=math.exp(min(sums.loss / n, 700.0)),
        original_perplexity=math.exp(min(sums.original_loss / n, 700.0)) if with_original else None,
        top1_agreement=sums.agreeing / n if with_original else None,
        kl_divergence=sums.divergence / n if with_original else None,
        n_windows=n_windows,
        tokens=n,
    )
