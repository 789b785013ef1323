"""Batches and windows of the kind that a network takes, from the data of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressor.core.batch import Batch, Examples, as_batch
from compressor.core.errors import DataError
from compressor.data.arrays import Arrays
from compressor.data.text import Text
from compressor.data.tokens import encode_sentences, frame_of, tokenize, windows
from compressor.plan.recipe import TOKENS_PER_BATCH, Recipe, learning_window

LONGEST_SENTENCE = 128
"""Tokens of a sentence that are looked at."""
_SENTENCES = 256


def n_generated(recipe: Recipe) -> int:
    """How many documents of a learning window's length the original has to write, for calibration and distillation."""
    calibration, learning = recipe.calibration, recipe.distill
    tokens = [calibration.tokens * calibration.generated]
    if learning.steps:
        tokens.append(min(learning.tokens, learning.steps * TOKENS_PER_BATCH) * learning.generated)
    return math.ceil(max(tokens) / learning_window(recipe))


def learning_batches(
    source: Text | Arrays | None, recipe: Recipe, tokenizer: Path, seed: int, generated: Tensor | None = None,
    family: str = "decoder",
) -> list[Batch]:  # fmt: skip
    """Windows for a family's gradient steps; `generated` (documents, window) is what the original wrote."""
    if not isinstance(source, Text):
        return []
    settings = recipe.distill
    share = 0.0 if generated is None else settings.generated
    window = learning_window(recipe)
    return _text_batches(source, tokenizer, family, settings.tokens, window, share, generated, seed + 1)


def calibration_batches(
    source: Text | Arrays, recipe: Recipe, tokenizer: Path, seed: int, generated: Tensor | None = None,
    family: str = "decoder",
) -> list[Batch]:  # fmt: skip
    """The arguments of a network of a family, batch by batch; `generated` (documents, tokens) is what the original
    wrote."""
    settings = recipe.calibration
    if isinstance(source, Text):
        share = 0.0 if generated is None else settings.generated
        return _text_batches(source, tokenizer, family, settings.tokens, settings.window, share, generated, seed)
    chosen, size = _chosen(source, recipe, seed)
    return [as_batch(part) for part in chosen.batches(size)]


def calibration_labels(source: Text | Arrays | None, recipe: Recipe, seed: int) -> list[Tensor] | None:
    """The labels of `calibration_batches`, (n,) per batch; None where there are none."""
    if not isinstance(source, Arrays) or source.labels is None:
        return None
    chosen, size = _chosen(source, recipe, seed)
    assert chosen.labels is not None
    return list(torch.from_numpy(chosen.labels.astype(np.int64)).split(size))


def training_examples(
    source: Text | Arrays, recipe: Recipe, tokenizer: Path, seed: int, family: str = "decoder"
) -> Examples:
    """All of the calibration data, for passes that train; of a text the windows that it is calibrated on.

    Raises:
        DataError: Labels are no classes.
    """
    if isinstance(source, Text):
        batches = calibration_batches(source, recipe, tokenizer, seed, family=family)
        return Examples({"input_ids": torch.cat([batch["input_ids"] for batch in batches])})
    labels = source.labels
    if labels is None:
        return Examples(as_batch(source.inputs))
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"{source.source}: labels are {labels.dtype}, and only classes are learned; give integers, or no labels: "
            "the original's outputs are learned then"
        )
    return Examples(as_batch(source.inputs), torch.from_numpy(labels.astype(np.int64)))


def _chosen(source: Arrays, recipe: Recipe, seed: int) -> tuple[Arrays, int]:
    """The examples to calibrate on, and how many make a batch."""
    if len(source) <= recipe.calibration.samples:  # none is copied
        return source, source.at_once
    order = np.random.default_rng(seed).permutation(len(source))[: recipe.calibration.samples]
    chosen = source.take(np.sort(order))
    return chosen, chosen.at_once


def _text_batches(
    source: Text, tokenizer: Path, family: str, tokens: int, window: int, share: float, generated: Tensor | None,
    seed: int,
) -> list[Batch]:  # fmt: skip
    """`tokens` in windows, `share` of them generated and spread evenly among those of the text."""
    n, frame = max(1, tokens // window), frame_of(tokenizer, family)
    written = torch.empty(0, window, dtype=torch.long)
    if generated is not None and share:
        pieces = _pieces(generated, frame.room(window))[: round(n * share)]
        written = torch.from_numpy(frame.around(pieces.numpy()))
    parts = [written]
    if len(written) < n:
        ids = tokenize(source, tokenizer)
        n_real = max(1, min(n - len(written), len(ids) // frame.room(window)))
        parts = [torch.from_numpy(windows(ids, window, n_real, seed, frame)), written]
    places = torch.cat([(torch.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    chosen = torch.cat(parts)[places.argsort(stable=True)]
    return [{"input_ids": part} for part in chosen.split(max(1, TOKENS_PER_BATCH // window)) if len(part)]


def _pieces(documents: Tensor, length: int) -> Tensor:
    """Documents (n, tokens) cut into pieces (m, length): each by itself, or joined where they are shorter."""
    tokens = documents.shape[1]
    ids = documents[:, : tokens // length * length] if tokens >= length else documents
    ids = ids.flatten()
    return ids[: len(ids) // length * length].view(-1, length)


def evaluation_windows(source: Text, recipe: Recipe, tokenizer: Path) -> np.ndarray:
    """The first windows of the evaluation text, as many as the recipe measures a decoder on."""
    settings = recipe.evaluation
    ids, frame = tokenize(source, tokenizer), frame_of(tokenizer, "decoder")
    n = max(1, min(settings.tokens // settings.window, len(ids) // frame.room(settings.window)))
    return windows(ids, settings.window, n, frame=frame)


def sentence_batches(source: Text, tokenizer: Path, longest: int | None = None) -> list[dict[str, np.ndarray]]:
    """The evaluation text's sentences as an encoder takes them: no longer than it has positions for."""
    sentences = source.sentences()[:_SENTENCES]
    length = min(LONGEST_SENTENCE, longest or LONGEST_SENTENCE)
    return [encode_sentences(sentences[i : i + 16], tokenizer, length) for i in range(0, len(sentences), 16)]
