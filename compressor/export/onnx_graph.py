"""An ONNX graph with its weights re-encoded: the nodes stay, but for those that multiply with an encoded tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxscript.version_converter
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor

from compressor.core.errors import ExportError
from compressor.core.tensors import EncodedTensors
from compressor.export.builder import CONTRIBUTED
from compressor.export.lowering import IR_VERSIONS, OPSETS, Mode
from compressor.export.rewriting import Rewriting
from compressor.onnx.file import OnnxSource, read_values

MODEL_FILE = "model.onnx"
STEM = "compressor/"
CONVERTIBLE_OPSET = 18
"""From here on graphs can be brought to the opset of mode standard."""


def export_onnx(
    source: OnnxSource, tensors: EncodedTensors, out_dir: Path,
    mode: Mode = "default", exact: bool = False, calibration: Sequence[Mapping[str, Tensor]] = (),
) -> Path:  # fmt: skip
    """Writes `out_dir`/model.onnx over `out_dir`/model.safetensors; returns its path.

    Inputs, outputs and opset are the source's; mode standard brings it to opset 25. What is no float32 tensor (shapes,
    masks) moves into the graph.

    Raises:
        ExportError: The graph's own opset is too old for mode standard, or too new for compat.
    """
    path = out_dir / MODEL_FILE
    model = source.model.clone()
    _set_opset(model, mode, path)
    names = {str(value.name): name for name, value in source.weights.values.items()}
    taken = set(names.values())
    for label, value in list(model.graph.initializers.items()):
        if label in names:
            model.graph.initializers.pop(label)
            value.const_value = None
            value.name = f"{STEM}{names[label]}"
            model.graph.inputs.append(value)
            value.metadata_props["tensor"] = names[label]
        elif isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(read_values(source.path, value.const_value), name=label)
    _free_names(model.graph, taken)
    writing = Rewriting(tensors, out_dir, mode, exact, lambda found: _finish(found, mode), STEM)
    return writing.write(model, path, calibration)


def decoded_graph(source: OnnxSource, tensors: EncodedTensors, path: Path) -> Path:
    """The source's graph with the values that `tensors` decode to, all of them within the file at `path`."""
    model = source.model.clone()
    names = {str(value.name): name for name, value in source.weights.values.items()}
    for label, value in model.graph.initializers.items():
        if label in names:
            value.const_value = ir.Tensor(tensors[names[label]].decode().numpy(), name=label)
        elif isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(read_values(source.path, value.const_value), name=label)
    ir.save(model, path)
    return path


def _set_opset(model: ir.Model, mode: Mode, path: Path) -> None:
    own = model.graph.opset_imports.get("", 1)
    if mode == "standard" and own < OPSETS[mode]:
        if own < CONVERTIBLE_OPSET:
            raise ExportError(
                f"{path}: --standard needs a graph of opset {CONVERTIBLE_OPSET} or newer; found {own}; export it "
                "again, or leave --standard out"
            )
        onnxscript.version_converter.convert_version(model, OPSETS[mode])
    if mode == "compat" and (own > OPSETS[mode] or model.ir_version > IR_VERSIONS[mode]):
        raise ExportError(
            f"{path}: is of opset {own} and IR version {model.ir_version}, which older onnxruntimes do not know; "
            "leave --compat out"
        )
    if mode == "standard":
        model.ir_version = max(model.ir_version, IR_VERSIONS[mode])


def _free_names(graph: ir.Graph, taken: set[str]) -> None:
    """Renames what has the name of a tensor, which its parts get."""
    inner = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*inner, *list(graph.initializers.values())):
        stem = str(value.name).partition("@")[0]
        if (stem in taken or stem.rpartition(".")[0] in taken) and value not in graph.outputs:
            value.name = f"{STEM}source.{value.name}"


def _finish(model: ir.Model, mode: Mode) -> None:
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    if mode == "standard" or not any(node.domain == CONTRIBUTED for node in model.graph.all_nodes()):
        RemoveUnusedOpsetsPass()(model)
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "compressor", None
