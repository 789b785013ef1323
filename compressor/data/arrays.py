"""Named arrays: .npz, .npy and .safetensors files, and what `module:callable` yields."""

from __future__ import annotations

import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from compressor.checkpoints.archive import BROKEN
from compressor.core.errors import DataError
from compressor.core.references import call, refusing
from compressor.plan.workload import Workload

LABELS = ("labels", "label", "y")
MAX_BATCHES = 1024
"""Batches taken from a callable, which may yield for ever."""


@dataclass(frozen=True)
class Arrays:
    """Examples along the first axis of every array; `labels` (n,) where there are any.

    `guessed`: the labels are places of folders in sorted order, which nobody said are the network's classes.
    `load`: what the network computes for one of them, once it was tried.
    """

    source: str
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    guessed: bool = False
    load: Workload | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(array) if np.ndim(array) else 0 for name, array in self._all().items()}
        single = next((name for name, array in self._all().items() if not np.ndim(array)), None)
        if single is not None:
            raise DataError(
                f"{self.source}: '{single}' is one number, and every array has a row for each example; a network that "
                "takes one number for all of them has it fixed, or, as an ONNX graph, is given it for each example "
                "(numpy.full(examples, number)), or compressed without data (--set affine.method=rtn)"
            )
        if not self.inputs or not all(lengths.values()):
            raise DataError(f"{self.source}: holds no examples; found {lengths or 'no arrays'}; give at least one")
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.source}: arrays differ in length; found {lengths}; the first axis counts examples")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def _all(self) -> dict[str, np.ndarray]:
        return self.inputs if self.labels is None else {**self.inputs, "labels": self.labels}

    def take(self, index: slice | np.ndarray) -> Arrays:
        """Some of the examples."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, inputs={name: array[index] for name, array in self.inputs.items()}, labels=labels)

    @property
    def at_once(self) -> int:
        """How many of them make a batch."""
        largest = max(array[0].size for array in self.inputs.values())
        return (self.load or Workload((), largest, largest)).at_once

    def split(self, evaluation_fraction: float = 0.2, seed: int = 0) -> tuple[Arrays, Arrays]:
        """To calibrate on and to evaluate on, at random: files are often sorted by label."""
        n_evaluation = max(1, round(len(self) * evaluation_fraction))
        if n_evaluation >= len(self):
            raise DataError(f"{self.source}: cannot be split; found {len(self)} example; give at least 2, or --eval")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[n_evaluation:])), self.take(np.sort(order[:n_evaluation]))

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """The inputs, `size` examples at a time."""
        for start in range(0, len(self), size):
            yield {name: array[start : start + size] for name, array in self.inputs.items()}


def load_arrays(source: str | Path) -> Arrays:
    """The arrays of a file, or of the batches that `module:callable` returns.

    A file's arrays are inputs by their names, but for `labels`. A batch is an array, a (inputs, labels) pair or a
    mapping by name; torch tensors serve as well.

    Raises:
        DataError: The source cannot be read, or its arrays do not fit together.
    """
    path = Path(source)
    if path.suffix.lower() not in (".npz", ".npy", ".safetensors"):
        return _from_callable(str(source))
    if not path.is_file():
        raise DataError(f"{path}: does not exist; give .npz, .npy or .safetensors, or module:callable")
    return named_arrays(str(path), _read(path))


def named_arrays(source: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Parts labels from inputs."""
    label = next((name for name in LABELS if name in arrays), None)
    inputs = {name: array for name, array in arrays.items() if name != label}
    return Arrays(source, inputs, None if label is None else np.asarray(arrays[label]))


_UNREADABLE = (*BROKEN, TypeError, KeyError, MemoryError, SyntaxError, tokenize.TokenError)
_MOST_INFLATED = 200
"""Times its size that compressed numbers may come to; ones that were measured seldom exceed ten."""


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        inflated = sum(entry.file_size for entry in archive.infolist())
    if inflated > _MOST_INFLATED * path.stat().st_size:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes would become {inflated}; save it uncompressed, with numpy.savez"
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(sorted(load_file(path).items()))
        if path.suffix == ".npy":
            return {"input": np.load(path, mmap_mode="r", allow_pickle=False)}
        _refuse_bomb(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (*_UNREADABLE, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read as {path.suffix[1:]}; {error}; save plain numeric arrays, no objects"
        ) from error


def _from_callable(reference: str) -> Arrays:
    module, colon, attribute = reference.partition(":")
    if not (module and colon and attribute):
        raise DataError(f"--data {reference}: is neither a file nor module:callable; write e.g. --data mydata:batches")
    batches = call(reference, "--data", DataError, lambda _: None)
    if isinstance(batches, Mapping) or _is_array(batches):
        batches = [batches]
    collected: dict[str, list[np.ndarray]] = {}
    with refusing(f"--data {reference}: could not be gone through", DataError):
        for number, batch in enumerate(islice(batches, MAX_BATCHES)):
            for name, array in _named(batch, f"--data {reference}, batch {number}").items():
                collected.setdefault(name, []).append(array)
    if not collected:
        raise DataError(f"--data {reference}: yielded no batches; expected arrays, pairs or mappings")
    try:
        joined = {name: np.concatenate(parts) for name, parts in collected.items()}
    except ValueError as error:
        raise DataError(f"--data {reference}: batches do not fit together; {error}; pad to one shape") from error
    return named_arrays(reference, joined)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _named(batch: Any, where: str) -> dict[str, np.ndarray]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        batch = {**(inputs if isinstance(inputs, Mapping) else {"input": inputs}), "labels": labels}
    elif _is_array(batch):
        batch = {"input": batch}
    if not isinstance(batch, Mapping) or not all(_is_array(array) for array in batch.values()):
        raise DataError(
            f"{where}: is a {type(batch).__name__}; expected an array, (inputs, labels) or a mapping of arrays"
        )
    return {str(name): _numpy(array) for name, array in batch.items()}


def _numpy(array: Any) -> np.ndarray:
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
