"""Networks that compute on bfloat16 in places are rounded in the graph as torch rounds them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime

from compressor.export.builder import GraphBuilder
from compressor.export.tracing import compute_in_float32


def test_onnxruntime_rounds_to_bfloat16_where_it_cannot_compute_on_it(tmp_path):
    float32, bfloat16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
    x = ir.Value(name="x", type=ir.TensorType(float32), shape=ir.Shape([2, 3]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="short")
    b = GraphBuilder(graph)
    short = b.cast(x, bfloat16)
    short.dtype = bfloat16
    product = b.op("Mul", short, short)
    product.dtype = bfloat16
    graph.outputs.append(b.cast(product, float32))
    graph.outputs[0].dtype = float32
    compute_in_float32(graph)
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    given = np.array([[1.2345, -3.21, 700.7], [0.001, 257.0, 1e5]], np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": given})
    assert np.array_equal(found, rounded(rounded(given) ** 2))


def rounded(array: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
