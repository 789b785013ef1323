"""What a run learns from and is judged by: two sources that share nothing. `data.batches` has batches of them.

Without torch where they are texts; arrays are tried on the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor import data
from compressor.core.errors import DataError
from compressor.core.options import RunOptions
from compressor.data.arrays import Arrays
from compressor.data.disjoint import check_disjoint
from compressor.data.images import preprocessing
from compressor.data.text import Text
from compressor.plan.recipe import Recipe

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint


@dataclass(frozen=True)
class Samples:
    """Two sources of one kind that share nothing; the calibration source is None where no pass needs data."""

    calibration: Text | Arrays | None
    evaluation: Text | Arrays | None
    overlap: float = 0.0

    def digest(self) -> dict[str, str | None]:
        """SHA-256 of both, for provenance."""
        return {"calibration": _digest(self.calibration), "evaluation": _digest(self.evaluation)}


def _digest(source: Text | Arrays | None) -> str | None:
    if source is None or isinstance(source, Text):
        return source.digest if source is not None else None
    found = hashlib.sha256()
    labels = {} if source.labels is None else {"labels of": source.labels}
    for name, array in (*sorted(source.inputs.items()), *labels.items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def load_samples(checkpoint: Checkpoint, recipe: Recipe, options: RunOptions) -> Samples:
    """The data of a run, checked to be disjoint and, where they are arrays, to fit the network.

    Raises:
        DataError: A network that is no language model has no built-in data; or the two overlap, or do not fit.
    """
    reads_text = checkpoint.family in ("decoder", "encoder")
    pictures = preprocessing(recipe.images, checkpoint.path, checkpoint.config or {})
    if options.data is None and not reads_text:
        if "data" in recipe.required:
            raise DataError(
                f"{checkpoint.path}: recipe '{recipe.name}' calibrates, and only language models have built-in data; "
                "give --data with a few hundred inputs (.npz, .safetensors or module:callable)"
            )
        (evaluation,) = _fitting(
            checkpoint, [None if options.eval is None else data.load(options.eval, pictures=pictures)]
        )
        return Samples(None, evaluation)
    splits = options.eval is None and options.data is not None
    loaded = [
        data.load(options.data, "calibration", pictures),
        None if splits else data.load(options.eval, "evaluation", pictures),
    ]
    calibration, evaluation = _fitting(checkpoint, loaded)
    assert calibration is not None
    if evaluation is None:
        calibration, evaluation = calibration.split()
    shared = 0.0 if recipe.evaluation.skipped else check_disjoint(calibration, evaluation)
    return Samples(calibration, evaluation, shared)


def _fitting(checkpoint: Checkpoint, sources: Sequence[Text | Arrays | None]) -> list[Text | Arrays | None]:
    """The sources, arrays among them as the network takes them."""
    for source in sources:
        if isinstance(source, Text) and checkpoint.family not in ("decoder", "encoder"):
            raise DataError(f"{source.source}: is text, but {checkpoint.architecture} reads arrays; give .npz or such")
    arrays = [each if isinstance(each, Arrays) else None for each in sources]
    if all(each is None for each in arrays):
        return list(sources)
    for source in arrays:
        if source is not None and "input_ids" in source.inputs:
            _refuse_foreign(source, checkpoint)
    from compressor.data.fit import fitted

    fitting = fitted(checkpoint, arrays)
    return [each if isinstance(each, Text) else found for each, found in zip(sources, fitting, strict=True)]


def _refuse_foreign(source: Arrays, checkpoint: Checkpoint) -> None:
    """Refuses arrays of tokens that are longer than the network's positions, or beyond its vocabulary."""
    tokens, longest, words = source.inputs["input_ids"], checkpoint.positions, vocabulary_of(checkpoint)
    if longest is not None and tokens.ndim > 1 and tokens.shape[1] > longest:
        raise DataError(
            f"{source.source}: has sequences of {tokens.shape[1]} tokens, and {checkpoint.path} has positions for "
            f"{longest}; cut them"
        )
    if words is not None and tokens.max() >= words:
        raise DataError(
            f"{source.source}: has token {tokens.max()}, and the table of {checkpoint.path} has {words} entries; make "
            "tokens with its own tokenizer"
        )


def vocabulary_of(checkpoint: Checkpoint) -> int | None:
    """Rows of the table of tokens, as the config says; where there is none, of the largest table."""
    if checkpoint.config is None:
        return max((info.shape[0] for info in checkpoint.tensors.values() if info.role == "embedding"), default=None)
    found = checkpoint.config.get("vocab_size")
    return found if isinstance(found, int) else None
