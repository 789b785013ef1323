"""What each layer takes alone in onnxruntime: the table that a search begins with.

A layer is timed as one operator on made-up values, on floats and as the artifact would compute it: a convolution on
int8 activations between what others have rounded (QLinearConv), a product with weights of few bits by MatMulNBits.
Equal operators are timed once, and what was timed is kept in a file.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compressor.core.files import write_text
from compressor.core.machine import processor
from compressor.graph.cost import watch_layers

RUNS, BLOCKS = 10, 3
GROUP = 32
"""Columns of a group of few bits, as it is timed."""


@dataclass(frozen=True)
class Operator:
    """A layer as one operator.

    weight  its shape, of a convolution (outputs, inputs / groups, …), of a product (outputs, inputs)
    rows    of a product, in one example; of a convolution the shape of its input instead, (channels, …)
    how     float, int8: with activations of int8; or how many bits its weights have
    """

    weight: tuple[int, ...]
    rows: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    how: str = "float"

    @property
    def is_convolution(self) -> bool:
        return len(self.rows) > 1


def operators(
    module: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Mapping[str, Tensor]
) -> dict[str, Operator]:  # fmt: skip
    """Weight's name -> its layer on floats; of linear layers and convolutions, at their last call."""
    found: dict[str, Operator] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        shape = tuple(layer.weight.shape)
        if isinstance(layer, nn.Linear):
            found[name] = Operator(shape, (inputs[0].shape[:-1].numel() // len(inputs[0]),))
        elif isinstance(layer, _ConvNd) and not layer.transposed and not isinstance(layer.padding, str):
            sizes = (tuple(layer.stride), tuple(layer.padding) * 2, tuple(layer.dilation))
            found[name] = Operator(shape, tuple(inputs[0].shape[1:]), *sizes, layer.groups)

    watch_layers(module, call, batch, note)
    return found


class Table:
    """Seconds of operators on this machine, in a file of this processor, these threads and this batch.

    Args:
        path: The file; what is there of another machine is not used.
    """

    def __init__(self, path: Path, threads: int | None, batch: int) -> None:
        self.path, self.threads, self.batch = path, threads, batch
        self._of = f"{processor()} | {threads} threads | {batch} at a time | onnxruntime {onnxruntime.__version__}"
        content = json.loads(path.read_text()) if path.is_file() else {}
        self._known: dict[str, float] = content.get(self._of, {})

    def seconds(self, operator: Operator) -> float:
        """What it takes, timed where that is not known."""
        key = json.dumps(asdict(operator))
        if key not in self._known:
            self._known[key] = timed(operator, self.threads, self.batch)
            write_text(self.path, json.dumps({self._of: self._known}))
        return self._known[key]


def timed(operator: Operator, threads: int | None = None, batch: int = 1) -> float:
    """Seconds of one operator: the least of the medians of its blocks."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    model = _model(operator, batch)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    values = np.random.default_rng(0).standard_normal(entry.shape)
    feed = {entry.name: np.abs(50 * values).astype(np.uint8) if "uint8" in entry.type else values.astype(np.float32)}
    session.run(None, feed)
    medians = []
    for _ in range(BLOCKS):
        times = []
        for _ in range(RUNS):
            began = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times))
    return min(medians)


def stored_as(operator: Operator, static: bool, bits: int) -> Operator:
    """The same as an artifact computes it, whose kernel takes weights of so many bits."""
    if operator.is_convolution:
        return replace(operator, how="int8") if static else operator
    return replace(operator, how=str(bits)) if bits in (2, 4, 8) else operator


def _model(operator: Operator, batch: int) -> onnx.ModelProto:
    int8 = operator.how == "int8"
    shape = [batch, *operator.rows] if operator.is_convolution else [batch, *operator.rows, operator.weight[1]]
    kind = TensorProto.UINT8 if int8 else TensorProto.FLOAT
    weights, nodes = _convolution(operator) if operator.is_convolution else _product(operator)
    graph = helper.make_graph(
        nodes, "operator", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _convolution(operator: Operator) -> tuple[dict[str, np.ndarray], list[onnx.NodeProto]]:
    attributes = {
        "strides": operator.strides, "pads": operator.pads, "dilations": operator.dilations, "group": operator.groups,
        "kernel_shape": operator.weight[2:],
    }  # fmt: skip
    weight = np.random.default_rng(0).standard_normal(operator.weight).astype(np.float32)
    n = operator.weight[0]
    if operator.how != "int8":
        return {"w": weight, "b": np.zeros(n, np.float32)}, [
            helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
        ]
    weights = {
        "w": (30 * weight).clip(-127, 127).astype(np.int8), "s": np.full(n, 0.01, np.float32),
        "z": np.zeros(n, np.int8), "b": np.zeros(n, np.int32), "t": np.full(n, 1e-3, np.float32),
        "i": np.zeros(n, np.int32), "a": np.float32(0.1), "o": np.uint8(128), "u": np.float32(1.0),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "a", "o"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "t", "i"], ["bf"], axis=0),
        helper.make_node("Conv", ["xf", "wf", "bf"], ["yf"], **attributes),
        helper.make_node("QuantizeLinear", ["yf", "u", "o"], ["y"]),
    ]
    return weights, nodes


def _product(operator: Operator) -> tuple[dict[str, np.ndarray], list[onnx.NodeProto]]:
    n, k = operator.weight
    if operator.how == "float":
        weight = np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)
        return {"w": weight}, [helper.make_node("MatMul", ["x", "w"], ["y"])]
    bits, blocks = int(operator.how), math.ceil(k / GROUP)
    codes = np.random.default_rng(0).integers(0, 256, (n, blocks, GROUP * bits // 8)).astype(np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=GROUP,
        accuracy_level=4,
    )  # fmt: skip
    return {"w": codes, "s": np.full((n, blocks), 0.01, np.float32)}, [node]
