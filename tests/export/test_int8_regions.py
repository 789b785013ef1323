"""Which operations compute on int8: the cut is the least of all labellings, and its times are of the right order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
import pytest

from compressor.export.int8_operations import int8_operations
from compressor.export.int8_regions import (
    _CLEAR,
    _DEQUANTISED,
    _QUANTISED,
    _START,
    convolution_times,
    regions,
    times,
)

INT8 = {
    "kind": "affine", "bits": 8, "group": 10**6, "zero": 128, "shape": [64, 64], "transposed": False,
}  # fmt: skip


class Graph:
    """A chain and branches of operations on (1, channels, side, side)."""

    def __init__(self, side: int) -> None:
        self.side, self.inputs, self.nodes = side, [self.value("x")], []
        self.descriptions: dict[ir.Value, dict] = {}
        self.shapes = {self.inputs[0]: (1, 64, side, side)}

    def value(self, name: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))

    def op(self, kind: str, *inputs: ir.Value, channels: int | None = None, **attributes) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes, name=f"{kind}.{len(self.nodes)}")
        self.nodes.append(node)
        node.outputs[0].name = f"v{len(self.nodes)}"
        node.outputs[0].dtype = ir.DataType.FLOAT
        self.shapes[node.outputs[0]] = (1, channels or self.shapes[inputs[0]][1], self.side, self.side)
        return node.outputs[0]

    def conv(self, x: ir.Value, outputs: int, kernel: int = 1, group: int = 1) -> ir.Value:
        inputs = self.shapes[x][1]
        weight = self.value(f"w{len(self.nodes)}")
        self.inputs.append(weight)
        self.descriptions[weight] = INT8 | {"tensor_shape": (outputs, inputs // group, kernel, kernel)}
        return self.op("Conv", x, weight, channels=outputs, group=group)

    def chosen(self, *outputs: ir.Value):
        graph = ir.Graph(self.inputs, list(outputs), nodes=self.nodes, opset_imports={"": 21})
        candidates = int8_operations(graph, self.descriptions.get, lambda value: value.dtype == ir.DataType.FLOAT)
        weights = {
            op: self.descriptions[op.node.inputs[1]]["tensor_shape"] for op in candidates if op.kind == "conv"
        }  # fmt: skip
        return candidates, regions(candidates, self.shapes, weights), weights


def cost(graph: Graph, candidates, labels, weights) -> float:
    """The definition: times of operations, and each change of a value once."""
    writer = {op.output: op for op in candidates}
    inner = {node: op for op in candidates for node in op.nodes}
    total = 0.0
    for op in candidates:
        floats, int8 = times(op, graph.shapes, weights.get(op))
        total += int8 * _CLEAR if labels[op] else floats
    for value in {value for op in candidates for value in (*op.inputs, op.output)}:
        made = value in writer and labels[writer[value]]
        readers = [inner.get(node) for node, _ in value.uses()]
        wants = {op is not None and labels[op] for op in readers} | ({False} if value.is_graph_output() else set())
        numbers = math.prod(graph.shapes[value]) / 1000
        if made and False in wants:
            total += _START + _DEQUANTISED * numbers
        if not made and True in wants:
            total += _START + _QUANTISED * numbers
    return total


@pytest.mark.parametrize("seed", range(12))
def test_no_other_labelling_takes_less_time(seed):
    generator = np.random.default_rng(seed)
    graph = Graph(int(generator.choice([7, 14, 28])))
    values = [graph.conv(graph.inputs[0], 64)]
    for _ in range(7):
        x = values[int(generator.integers(max(0, len(values) - 3), len(values)))]
        kind = generator.choice(["conv", "depthwise", "Add", "Sigmoid", "Relu", "Tanh"])
        if kind == "conv":
            values.append(graph.conv(x, 64, int(generator.choice([1, 3]))))
        elif kind == "depthwise":
            values.append(graph.conv(x, 64, 3, 64))
        elif kind == "Add":
            values.append(graph.op("Add", x, values[0]) if x is not values[0] else graph.op("Tanh", x))
        else:
            values.append(graph.op(str(kind), x))
    candidates, found, weights = graph.chosen(values[-1], values[-2])
    least = min(
        cost(graph, candidates, dict(zip(candidates, labels, strict=True)), weights)
        for labels in itertools.product([False, True], repeat=len(candidates))
    )
    assert cost(graph, candidates, {op: op in found for op in candidates}, weights) == pytest.approx(least)


def test_sums_between_wide_convolutions_stay_int8():
    graph = Graph(28)
    x = graph.conv(graph.inputs[0], 64, 3)
    y = graph.conv(x, 64, 3)
    out = graph.conv(graph.op("Add", x, y), 64, 3)
    candidates, found, _ = graph.chosen(out)
    assert [op.node.op_type for op in candidates] == ["Conv", "Conv", "Add", "Conv"]
    assert found == candidates


def test_a_depthwise_convolution_alone_stays_on_floats():
    graph = Graph(56)
    _, found, _ = graph.chosen(graph.op("Tanh", graph.conv(graph.op("Tanh", graph.inputs[0]), 64, 3, 64)))
    assert found == []


@pytest.mark.parametrize(("weight", "group", "positions", "floats", "int8"), [
    ((128, 128, 3, 3), 1, 1600, 3119, 841), ((64, 64, 1, 1), 1, 1600, 115, 54), ((24, 24, 3, 3), 1, 1600, 306, 109),
    ((128, 1, 3, 3), 128, 784, 62, 72), ((32, 1, 5, 5), 32, 3136, 65, 263), ((16, 16, 1, 1), 1, 1600, 21, 23),
])  # fmt: skip
def test_times_are_within_a_factor_of_those_measured(weight, group, positions, floats, int8):
    found = convolution_times(weight, group, positions)
    assert found[0] == pytest.approx(floats, rel=0.6)
    assert found[1] == pytest.approx(int8, rel=0.6)
