"""What binary tensors are when they are computed with: read off the graph that was written.

One bit lies on disk in every case. onnxruntime unpacks it once, when it loads the graph.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from compressor.core.tensors import EncodedTensors

KERNELS = {
    "MatMulNBits": "a low-bit matrix product", "GatherBlockQuantized": "a low-bit look-up",
    "Conv": "a float32 convolution", "ConvTranspose": "a float32 convolution",
    "MatMul": "a float32 matrix product", "Gemm": "a float32 matrix product",
    "FusedMatMul": "a float32 matrix product",
}  # fmt: skip
INT8 = "an int8 convolution"


def binary_layers(graph: Path, tensors: EncodedTensors) -> dict[str, Any]:
    """Bytes of the binary tensors, those of the same weights in float32, and what each runs as; empty without any."""
    names = [name for name in tensors if tensors.describe(name)["kind"] == "binary"]
    if not names:
        return {}
    runs_as = _consumers(graph, tensors, names) if graph.is_file() else {}
    rows_columns = [tensors.describe(name)["shape"] for name in names]
    return {
        "layers": len(names),
        "bytes": sum(tensors[name].encoding.nbytes for name in names),
        "float_bytes": sum(4 * rows * columns for rows, columns in rows_columns),
        "runs_as": dict(sorted(Counter(runs_as.values()).items())),
        "each": runs_as,
    }


def _consumers(graph: Path, tensors: EncodedTensors, names: list[str]) -> dict[str, str]:
    """By name what reads the initialiser in which a tensor's codes lie, which may hold other tensors' beside."""
    values = [(value, value.const_value) for value in ir.load(graph).graph.initializers.values()]
    external = [(value, stored) for value, stored in values if isinstance(stored, ir.ExternalTensor)]
    found = {}
    for name in names:
        place = tensors.place(name, "codes")
        for value, stored in external:
            within = (stored.offset or 0) <= place.offset < (stored.offset or 0) + (stored.length or 0)
            if str(stored.location) == place.file and within:
                found[name] = _runs_as(value)
                break
    return found


def _runs_as(codes: ir.Value) -> str:
    """The first kernel that the nodes after the stored bits lead to."""
    values, seen = [(codes, "")], set()
    while values:
        value, last = values.pop(0)
        for node, _ in value.uses():
            if node.op_type in KERNELS:
                return INT8 if node.op_type == "Conv" and last == "DequantizeLinear" else _label(node)
            if node not in seen:
                seen.add(node)
                values += [(output, node.op_type) for output in node.outputs]
    return "nothing"


def _label(node: ir.Node) -> str:
    label = KERNELS[node.op_type]
    bits = node.attributes.get_int("bits", 0)
    return label.replace("low-bit", f"{bits}-bit") if bits else label
