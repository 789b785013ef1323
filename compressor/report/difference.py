"""Two artifacts beside each other, tensor by tensor: how each is stored, its bytes, and how far its values differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from compressor.core.artifact import WEIGHTS, Artifact
from compressor.core.errors import CheckpointError
from compressor.core.packed import encoding_label, packed_tensors
from compressor.core.tensors import EncodedTensors


@dataclass(frozen=True)
class Difference:
    """One tensor; None where an artifact does not have it. `error` is ‖A − B‖ / ‖A‖ of the decoded values."""

    name: str
    encodings: tuple[str | None, str | None]
    bytes: tuple[int | None, int | None]
    error: float | None

    @property
    def same(self) -> bool:
        return self.error == 0 and self.encodings[0] == self.encodings[1]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"same": self.same}


def compare(first: Path, second: Path) -> list[Difference]:
    """The tensors of two artifacts, in the order of the first; one of each in memory at a time.

    Raises:
        CheckpointError: One of them is no artifact, or its weights are damaged.
    """
    described, tensors = zip(*(_opened(directory) for directory in (first, second)), strict=True)
    found = []
    for name in dict.fromkeys([*described[0], *described[1]]):
        both = [each.get(name) for each in described]
        labels = tuple(encoding_label(each) if each else None for each in both)
        sizes = tuple(each["bytes"] if each else None for each in both)
        shapes = [each["tensor_shape"] if each else None for each in both]
        error = _distance(tensors, name) if all(both) and shapes[0] == shapes[1] else None
        found.append(Difference(name, labels, sizes, error))  # type: ignore[arg-type]
    return found


def _opened(directory: Path) -> tuple[dict[str, dict[str, Any]], EncodedTensors]:
    weights = Artifact.open(directory).directory / WEIGHTS
    described = packed_tensors(weights)
    if described is None:
        raise CheckpointError(f"{weights}: is no file of packed tensors; compress again")
    return described, EncodedTensors([weights])


def _distance(tensors: tuple[EncodedTensors, ...], name: str) -> float:
    try:
        first, second = (each[name].decode().double() for each in tensors)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"tensor '{name}': cannot be rebuilt from its parts; {error}; compress again") from error
    norm = float(first.norm())
    distance = float((first - second).norm())
    return distance / norm if norm else float(distance > 0)
