"""The beginnings of stored tensors: encodings of their own, and in onnxruntime one kernel over the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from compressor.core.encoding import Affine, Encoding, Layout, describe
from compressor.core.errors import CheckpointError
from compressor.core.tensors import EncodedTensor, EncodedTensors, Part, SizeTensors, write_tensors
from compressor.export.builder import GraphBuilder
from compressor.export.lowering import IR_VERSIONS, OPSETS, Lowering, form
from tests.export.test_lowering import COLUMNS, affine, codebook, dense, fine, is_close

N = (20, 64)
"""Rows and columns of the smaller matrix."""
ENCODINGS: dict[str, Encoding] = {
    "float32": dense(torch.float32),
    "float16": dense(torch.float16),
    "affine4": affine(4, 32),
    "affine4zeros": affine(4, 32, "tensor"),
    "affine4bytes": affine(4, 16, scale_bits=8),
    "affine4fine": fine(4, 32),
    "affine8": affine(8, 32),
    "affine8row": affine(8, COLUMNS),
    "affine3": affine(3, 32),
    "affine2": affine(2, 32),
}


def written(directory: Path, tensor: EncodedTensor, shape: tuple[int, ...]) -> SizeTensors:
    """The beginning of a tensor, in a file of the whole."""
    write_tensors(directory / "model.safetensors", {"w": tensor})
    return SizeTensors(directory / "model.safetensors", {"v": Part("w", shape)}, {})


def session_of(directory: Path, tensors: EncodedTensors, operator: str, columns: int) -> onnxruntime.InferenceSession:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "length", columns]))
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": OPSETS["default"], "com.microsoft": 1})
    builder = GraphBuilder(graph)
    lowering = Lowering(tensors, builder, "default", True, directory)
    y = lowering.matmul(x, "v") if operator == "matmul" else builder.op("Identity", lowering.constant("v"))
    y.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    ir.save(ir.Model(graph, ir_version=IR_VERSIONS["default"]), directory / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(directory / "optimised.onnx")
    return onnxruntime.InferenceSession(directory / "model.onnx", options)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_beginning_computes_what_it_decodes_to_and_folds_to_one_kernel(tmp_path, name):
    encoding = ENCODINGS[name]
    tensors = written(tmp_path, EncodedTensor(encoding, Layout(encoding.shape)), N)
    wanted = encoding.decode()[: N[0], : N[1]]
    assert torch.equal(tensors["v"].decode(), wanted)
    assert tensors.nbytes("v") == tensors["v"].encoding.nbytes < encoding.nbytes
    x = torch.randn(2, 3, N[1], generator=torch.Generator().manual_seed(1))
    is_close(session_of(tmp_path, tensors, "matmul", N[1]).run(None, {"x": x.numpy()})[0], x @ wanted.T)
    chosen = form(describe(encoding), "default")
    kernel = "MatMulNBits" if chosen else "FusedMatMul"
    operators = [node.op_type for node in ir.load(tmp_path / "optimised.onnx").graph]
    assert sorted(operators) == sorted(
        [kernel, *(["MatMul", "FusedMatMul", "Add"] if chosen and chosen.shifted else [])]
    )


@pytest.mark.parametrize("shape", [(8, 12, 3, 3), (20, 6, 3, 3), (8, 6, 3, 3)])
def test_a_convolution_is_cut_along_both_axes(tmp_path, shape):
    weights = torch.randn(20, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    tensors = written(tmp_path, EncodedTensor.dense(weights), shape)
    wanted = weights[: shape[0], : shape[1]]
    assert torch.equal(tensors["v"].decode(), wanted)
    found = session_of(tmp_path, tensors, "constant", 4).run(None, {"x": np.zeros((1, 1, 4), np.float32)})[0]
    assert np.array_equal(found, wanted.numpy())


def test_fewer_rows_are_the_same_bytes_and_no_cut(tmp_path):
    tensors = written(tmp_path, EncodedTensor(ENCODINGS["affine4"], Layout(ENCODINGS["affine4"].shape)), (20, COLUMNS))
    session_of(tmp_path, tensors, "matmul", COLUMNS)
    graph = ir.load(tmp_path / "model.onnx").graph
    assert not any(node.op_type == "Slice" for node in graph)
    sizes = {
        str(name).partition("@")[0]: value.const_value.length
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert sizes == {"v.codes": 20 * COLUMNS // 2, "v.scales": 20 * COLUMNS // 32 * 2}


def test_a_transposed_matrix_begins_with_fewer_inputs_and_outputs(tmp_path):
    encoding = ENCODINGS["affine4"]
    tensor = EncodedTensor(encoding, Layout(encoding.shape[::-1], transposed=True))
    found = written(tmp_path, tensor, (N[1], N[0]))["v"].decode()
    assert torch.equal(found, tensor.decode()[: N[1], : N[0]])


@pytest.mark.parametrize(
    ("encoding", "columns", "message"),
    [
        (affine(4, 32), 40, "40 of 160 columns end within a group of 32"),
        (codebook(4, 2), 64, "stored as codebook, of which a part cannot be read alone"),
        (replace(affine(8, COLUMNS), group=COLUMNS), 61, "61 of 160 columns end within a group"),
    ],
)
def test_what_a_cut_goes_through_is_refused_by_name(encoding, columns, message):
    with pytest.raises(CheckpointError, match=message):
        EncodedTensor(encoding, Layout(encoding.shape)).beginning((20, columns))


def test_a_row_of_one_group_begins_with_any_whole_bytes():
    encoding = affine(8, COLUMNS)
    assert isinstance(encoding, Affine)
    found = encoding.beginning(3, 72)
    assert found.group == 72
    assert torch.equal(found.decode(), encoding.decode()[:3, :72])
