"""Networks of any kind: agreement and accuracy of their classes, relative error of their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.core.errors import DataError
from compressor.data.arrays import Arrays
from compressor.evaluate.session import ModuleSession


@dataclass(frozen=True)
class ModuleQuality:
    """Errors are |artifact − original| over the original's largest |output|; accuracies are None without labels.

    Agreement is of the largest entry along the last axis of the first output.
    """

    top1_agreement: float
    accuracy: float | None
    original_accuracy: float | None
    max_relative_error: float
    mean_relative_error: float
    n_examples: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_module(
    session: ModuleSession, reference_outputs: Iterable[np.ndarray], data: Arrays, batch: int = 32
) -> ModuleQuality:
    """Compares the first output with the original's, which come for `data.batches(batch)` in order.

    Raises:
        DataError: The reference ends early, has another shape, or labels do not fit the outputs.
    """
    name = session.outputs[0]
    reference = iter(reference_outputs)
    outputs, originals = [], []
    for inputs in data.batches(batch):
        original = next(reference, None)
        if original is None:
            raise DataError(f"{data.source}: the reference ends after {len(originals)} batches; expected one per batch")
        outputs.append(session.run(inputs, [name])[name].astype(np.float64))
        originals.append(np.asarray(original, dtype=np.float64))
        if outputs[-1].shape != originals[-1].shape:
            raise DataError(f"{name}: has shape {outputs[-1].shape}; the original's is {originals[-1].shape}")
    return compare_outputs(np.concatenate(outputs), np.concatenate(originals), data.labels)


def compare_outputs(outputs: np.ndarray, originals: np.ndarray, labels: np.ndarray | None = None) -> ModuleQuality:
    """outputs and originals (n, …, classes); labels (n, …)."""
    difference = np.abs(outputs - originals)
    largest = np.abs(originals).max() or 1.0
    classes, original_classes = outputs.argmax(-1), originals.argmax(-1)
    if labels is not None and labels.shape != classes.shape:
        raise DataError(f"labels: have shape {labels.shape}; the outputs' classes have {classes.shape}")
    return ModuleQuality(
        top1_agreement=float((classes == original_classes).mean()),
        accuracy=None if labels is None else float((classes == labels).mean()),
        original_accuracy=None if labels is None else float((original_classes == labels).mean()),
        max_relative_error=float(difference.max() / largest),
        mean_relative_error=float(difference.mean() / largest),
        n_examples=len(outputs),
    )
