"""The original network as an uncompressed artifact, to measure speed and memory beside: written, measured, removed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoints import Checkpoint
from compressor.core.batch import Batch
from compressor.core.errors import CheckpointError, ExportError
from compressor.core.report import Speed
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.evaluate.bench import bench
from compressor.plan.recipe import Evaluation

LARGEST = 4_000_000_000
"""Bytes in float32 up to which the original is run whole: beyond, that would cost more memory than compressing it."""


class OriginalTensors(Mapping[str, EncodedTensor]):
    """A checkpoint's tensors as they are, float32, read one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> EncodedTensor:
        tensor = self.checkpoint.read(name)
        return EncodedTensor.dense(tensor, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)


def export_original(checkpoint: Checkpoint, directory: Path, batches: list[Batch]) -> Path:
    """Writes the uncompressed artifact into a directory, by the same exporter; returns the graph's path."""
    from compressor.export.writing import export_graph

    if checkpoint.config is not None:
        (directory / "config.json").write_text(json.dumps(checkpoint.config))
    write_tensors(directory / "model.safetensors", OriginalTensors(checkpoint), checkpoint.tied)
    tensors = EncodedTensors([directory / "model.safetensors"])
    return export_graph(checkpoint, tensors, directory, "default", False, batches)


def speeds(
    directory: Path, checkpoint: Checkpoint, evaluation: Evaluation, batches: list[Batch]
) -> tuple[Speed, Speed | None]:
    """Of the artifact and of its original, each in a process of its own, or that they were not measured."""
    shapes: dict[str, list[int]] = {}
    if checkpoint.family == "module" and batches:  # axes may be open that are not free
        shapes = {name: [1, *tensor.shape[1:]] for name, tensor in batches[0].items() if tensor.dim()}
    if not evaluation.speed:  # `compress bench` can still measure it, with inputs of these shapes
        return Speed.model_validate({"measured": False} | ({"input_shapes": shapes} if shapes else {})), None
    batches = [] if evaluation.skipped else batches
    found = _measured(lambda: bench(directory, shapes=shapes), directory)
    assert found is not None
    original = _measured(lambda: bench_original(checkpoint, directory, batches, shapes), directory) if batches else None
    return found, original


def _measured(measure: Callable[[], dict[str, Any] | None], directory: Path) -> Speed | None:
    """What was measured, or why it could not be: an artifact that is proved and judged is not lost for a figure."""
    try:
        found = measure()
    except (CheckpointError, ExportError) as error:
        return Speed(failure=str(error).replace(f"{directory}/", ""))
    return None if found is None else Speed.model_validate(found)


def bench_original(
    checkpoint: Checkpoint, beside: Path, batches: list[Batch], shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any] | None:
    """What `bench` says of the uncompressed artifact, None where it is too large; `beside` names the disk for it.

    An ONNX graph is measured as it is.
    """
    if 4 * sum(info.numel for info in checkpoint.tensors.values()) > LARGEST:
        return None
    if checkpoint.kind == "onnx":
        return bench(checkpoint.source.files[0], shapes=shapes)
    scratch = Path(tempfile.mkdtemp(prefix=".original-", dir=beside))
    try:
        export_original(checkpoint, scratch, batches)
        return bench(scratch, shapes=shapes)
    finally:
        shutil.rmtree(scratch)
