"""The original network as an uncompressed artifact, to measure speed and memory beside: written, measured, removed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoints import Checkpoint
from compressor.core.batch import Batch
from compressor.core.errors import CheckpointError, ExportError
from compressor.core.report import Speed
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.evaluate.bench import alternated, bench
from compressor.evaluate.installation import graph_to_run
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
    directory: Path, checkpoint: Checkpoint, evaluation: Evaluation, batches: list[Batch],
    promised: float | None = None,
) -> tuple[Speed, Speed | None]:  # fmt: skip
    """Of the artifact and of its original, each in a process of its own, or that they were not measured.

    Args:
        promised: Times the original's speed, below which latencies are not believed alone.
    """
    shapes: dict[str, list[int]] = {}
    if checkpoint.family == "module" and batches:  # axes may be open that are not free
        shapes = {name: [1, *tensor.shape[1:]] for name, tensor in batches[0].items() if tensor.dim()}
    if not evaluation.speed:  # `compress bench` can still measure it, with inputs of these shapes
        return Speed.model_validate({"measured": False} | ({"input_shapes": shapes} if shapes else {})), None
    batches = [] if evaluation.skipped else batches
    found = _measured(lambda: bench(directory, shapes=shapes), directory)
    if not batches:
        return found, None
    with ExitStack() as stack:
        try:
            graph = stack.enter_context(original_graph(checkpoint, directory, batches))
        except ExportError as error:
            return found, Speed(failure=str(error).replace(f"{directory}/", ""))
        if graph is None:
            return found, None
        original = _measured(lambda: bench(graph, shapes=shapes), directory)
        if found.latency_seconds is not None and original.latency_seconds is not None:
            return _side_by_side(found, original, [graph_to_run(directory), graph_to_run(graph)], shapes, promised)
    return found, original


def _side_by_side(
    found: Speed, original: Speed, graphs: Sequence[Path], shapes: Mapping[str, Sequence[int]], promised: float | None
) -> tuple[Speed, Speed]:  # fmt: skip
    """With latencies of both in turn, which a machine that is busy for a while cannot tell apart; of an artifact that
    seems to break its promise with the processor's time on one thread as well."""
    try:
        latencies = alternated(graphs, shapes=shapes)
        if promised and latencies[1]["latency_seconds"] < promised * latencies[0]["latency_seconds"]:
            for latency, alone in zip(latencies, alternated(graphs, 1, shapes, processor=True), strict=True):
                latency["processor_seconds"] = alone["latency_seconds"]
    except CheckpointError:
        return found, original
    both = [each.model_copy(update=latency) for each, latency in zip((found, original), latencies, strict=True)]
    return both[0], both[1]


def _measured(measure: Callable[[], dict[str, Any]], directory: Path) -> Speed:
    """What was measured, or why it could not be: an artifact that is proved and judged is not lost for a figure."""
    try:
        return Speed.model_validate(measure())
    except (CheckpointError, ExportError) as error:
        return Speed(failure=str(error).replace(f"{directory}/", ""))


@contextmanager
def original_graph(checkpoint: Checkpoint, beside: Path, batches: list[Batch]) -> Iterator[Path | None]:
    """The graph of the uncompressed artifact, or its folder, while it is needed; None where it is too large.

    `beside` names the disk for it. An ONNX graph is measured as it is.
    """
    if 4 * sum(info.numel for info in checkpoint.tensors.values()) > LARGEST:
        yield None
        return
    if checkpoint.kind == "onnx":
        yield checkpoint.source.files[0]
        return
    scratch = Path(tempfile.mkdtemp(prefix=".original-", dir=beside))
    try:
        export_original(checkpoint, scratch, batches)
        yield scratch
    finally:
        shutil.rmtree(scratch)
