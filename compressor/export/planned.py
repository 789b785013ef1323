"""The graph of a plan before anything is encoded: what its file will weigh, to the byte."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.core.artifact import WEIGHTS
from compressor.core.encoding import Layout
from compressor.core.packed import part_name, spans
from compressor.core.spec import DenseSpec
from compressor.core.tensors import EncodedTensor, EncodedTensors, Place
from compressor.export.forms import Mode
from compressor.export.writing import export_graph
from compressor.plan.plan import Plan
from compressor.plan.sizes import header_bytes


class PlannedTensors(EncodedTensors):
    """Tensors described as a plan says, and not there; those that stay as they are come from the checkpoint."""

    def __init__(self, plan: Plan, checkpoint: Any) -> None:
        super().__init__([], plan.tied)
        self._checkpoint = checkpoint
        begin, sizes = header_bytes(plan.tensors, plan.tied), {}
        for tensor in plan.tensors:
            parts = tensor.spec.parts(*tensor.matrix)
            self._descriptions[tensor.name] = {
                **tensor.describe(), "tensor_shape": list(tensor.shape),
                "transposed": tensor.transposed and bool(tensor.by), "parts": sorted(parts),
            }  # fmt: skip
            for part, (dtype, shape) in parts.items():
                sizes[tensor.name, part] = DenseSpec(dtype=dtype).nbytes(1, math.prod(shape))
        for (name, part), (first, behind) in spans(sizes).items():
            self._places[part_name(name, part)] = Place(WEIGHTS, begin + first, behind - first)

    def __contains__(self, name: object) -> bool:
        return name in self._descriptions

    def __getitem__(self, name: str) -> EncodedTensor:
        tensor = self._checkpoint.read(self.tied.get(name, name))
        return EncodedTensor(EncodedTensor.dense(tensor, tensor.dtype).encoding, Layout(tuple(tensor.shape)))


def planned_bytes(plan: Plan, checkpoint: Any, mode: Mode, exact: bool, batches: list[dict[str, Tensor]]) -> int:
    """Bytes of every file of the artifact: the graph is written to a scratch folder, and weighed.

    Not for mode standard, which repacks weights, nor for static_int8, whose ranges come from them.
    """
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        directory = Path(scratch)
        export_graph(
            checkpoint, PlannedTensors(plan, checkpoint), directory, mode, exact, batches
        )  # fmt: skip
        written = sum(file.stat().st_size for file in directory.iterdir())
    if checkpoint.config is not None:
        written += len(json.dumps(checkpoint.config, indent=1, ensure_ascii=False).encode()) + 1
    estimated = plan.files["model.onnx"] + plan.files.get("configuration", 0)
    return plan.bytes_after - estimated + written
