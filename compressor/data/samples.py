"""What a run learns from and is judged by: two sources that share nothing. No torch; `data.batches` has batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor import data
from compressor.core.errors import DataError
from compressor.core.options import RunOptions
from compressor.data.arrays import Arrays
from compressor.data.disjoint import check_disjoint
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
        found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def load_samples(checkpoint: Checkpoint, recipe: Recipe, options: RunOptions) -> Samples:
    """The data of a run, checked to be disjoint.

    Raises:
        DataError: A network that is no language model has no built-in data; or the two overlap.
    """
    reads_text = checkpoint.family in ("decoder", "encoder")
    if options.data is None and not reads_text:
        if "data" in recipe.required:
            raise DataError(
                f"{checkpoint.path}: recipe '{recipe.name}' calibrates, and only language models have built-in data; "
                "give --data with a few hundred inputs (.npz, .safetensors or module:callable)"
            )
        return Samples(None, None if options.eval is None else _arrays(data.load(options.eval), checkpoint))
    calibration = data.load(options.data, "calibration")
    if options.eval is not None or (options.data is None and reads_text):
        evaluation = data.load(options.eval, "evaluation")
    else:
        calibration, evaluation = calibration.split()
    if not reads_text:
        calibration, evaluation = _arrays(calibration, checkpoint), _arrays(evaluation, checkpoint)
    return Samples(calibration, evaluation, check_disjoint(calibration, evaluation))


def _arrays(source: Text | Arrays, checkpoint: Checkpoint) -> Arrays:
    if isinstance(source, Text):
        raise DataError(f"{source.source}: is text, but {checkpoint.architecture} reads arrays; give .npz or such")
    return source
