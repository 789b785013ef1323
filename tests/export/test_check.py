"""The known slow forms are found in the graph that onnxruntime runs; what compressor writes has none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from compressor.export.builder import GraphBuilder
from compressor.export.check import slow_paths
from compressor.export.lowering import refusal
from tests.export import test_lowering


def written(directory, build) -> list[str]:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 128]))
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 21, "com.microsoft": 1})
    y = build(GraphBuilder(graph), x)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    ir.save(ir.Model(graph, ir_version=10), directory / "model.onnx")
    return slow_paths(directory / "model.onnx")


def kernel(b: GraphBuilder, x: ir.Value, bits: int, block: int, level: int, float_zeros: bool = False) -> ir.Value:
    blocks = 128 // block if block <= 128 else 1
    codes = b.constant(np.zeros((16, blocks, block * bits // 8), np.uint8))
    operands = [codes, b.constant(np.ones((16, blocks), np.float32))]
    operands += [b.constant(np.full((16, blocks), 2.0, np.float32))] if float_zeros else []
    return b.contributed("MatMulNBits", x, *operands, K=128, N=16, bits=bits, block_size=block, accuracy_level=level)


@pytest.mark.parametrize(
    ("bits", "block", "level", "float_zeros", "reason"),
    [
        (4, 32, 4, False, None),
        (4, 32, 0, False, None),
        (2, 64, 4, False, None),
        (2, 64, 0, False, "only 4 is fast"),
        (8, 32, 1, False, "only 4 is fast"),
        (2, 16, 4, False, "only 32, 64 and 128 are fast"),
        (2, 256, 4, False, "only 32, 64 and 128 are fast"),
        (4, 32, 4, True, "only packed uint8 ones are fast"),
    ],
)
def test_slow_kernels_are_named(tmp_path, bits, block, level, float_zeros, reason):
    found = written(tmp_path, lambda b, x: kernel(b, x, bits, block, level, float_zeros))
    assert found == [] if reason is None else len(found) == 1 and found[0].endswith(reason)


def test_weights_that_do_not_fold_are_named(tmp_path):
    def build(b: GraphBuilder, x: ir.Value) -> ir.Value:
        codes = b.initializer(ir.Tensor(np.zeros((16, 128), np.uint8), name="codes"))
        scales = b.constant(np.ones((16, 4), np.float32))
        weight = b.op("DequantizeLinear", codes, scales, axis=1, block_size=32)
        return b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))

    found = written(tmp_path, build)
    assert len(found) == 1 and "unpacked at every run by DequantizeLinear" in found[0]


@pytest.mark.parametrize("mode", ["default", "compat", "standard"])
@pytest.mark.parametrize("name", test_lowering.ENCODINGS)
def test_what_the_lowering_writes_is_fast(tmp_path, name, mode):
    encoding = test_lowering.ENCODINGS[name]
    if refusal(test_lowering.describe(encoding), "matmul", mode):
        pytest.skip("refused in the plan")
    test_lowering.graph_of(tmp_path, encoding, "matmul", mode)
    assert slow_paths(tmp_path / "model.onnx", exact=True) == []


def test_operands_behind_a_gate_that_never_opens_are_named(tmp_path):
    """A look-up whose codes wait for something that only a run tells."""

    def build(b: GraphBuilder, x: ir.Value) -> ir.Value:
        codes = b.constant(np.zeros((16, 4, 16), np.uint8))
        one = b.op("Min", b.op("Slice", b.op("Shape", x), *(b.integers(n) for n in (0, 1))), b.integers(1))
        waiting = b.op("Reshape", codes, b.op("Mul", b.integers(16, 4, 16), one))
        found = b.op("Gather", b.constant(np.arange(256, dtype=np.uint8)), b.cast(waiting, ir.DataType.INT32))
        scales = b.constant(np.ones((16, 4), np.float32))
        return b.contributed("MatMulNBits", x, found, scales, K=128, N=16, bits=4, block_size=32, accuracy_level=4)

    found = written(tmp_path, build)
    assert len(found) == 1 and "is made at every run by Gather; that should fold" in found[0]
