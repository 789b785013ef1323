"""The graph of a plan before anything is encoded: what its file will weigh, to the byte."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.core.artifact import WEIGHTS
from compressor.core.encoding import Layout
from compressor.core.packed import packed_header, part_name
from compressor.core.tensors import EncodedTensor, EncodedTensors, Place
from compressor.export.forms import Mode
from compressor.export.writing import export_graph
from compressor.plan.plan import Plan
from compressor.plan.sizes import described, stored_parts


class PlannedTensors(EncodedTensors):
    """Tensors described as a plan says, and not there; those that stay as they are come from the checkpoint."""

    def __init__(self, plan: Plan, checkpoint: Any) -> None:
        super().__init__([], plan.tied)
        self._checkpoint = checkpoint
        self._descriptions = described(plan.tensors)
        header, spans = packed_header(self._descriptions, stored_parts(plan.tensors), plan.tied)
        for (name, part), (first, behind) in spans.items():
            self._places[part_name(name, part)] = Place(WEIGHTS, len(header) + first, behind - first)

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
        export_graph(checkpoint, PlannedTensors(plan, checkpoint), directory, mode, exact, batches)
        written = sum(file.stat().st_size for file in directory.iterdir())
    if checkpoint.config is not None:
        written += len(json.dumps(checkpoint.config, indent=1, ensure_ascii=False).encode()) + 1
    estimated = plan.files["model.onnx"] + plan.files.get("configuration", 0)
    return plan.bytes_after - estimated + written
