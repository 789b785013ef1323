"""Which candidates compute on int8: those with which the graph takes the least time, as modelled.

What int8 gains is in convolutions of many channels; what it costs is at the borders, where numbers change to int8 and
back, and the layout with them. Each candidate is labelled int8 or float. The time of a labelling is the sum of the
candidates' times and, for each value, of the changes that its readers need; the least of it is a minimum cut
(V. Kolmogorov, R. Zabih, "What Energy Functions Can Be Minimized via Graph Cuts?", PAMI 2004,
https://doi.org/10.1109/TPAMI.2004.1262177). Times are a model and no measurement, so that equal runs write equal
graphs. Its constants are of onnxruntime 1.32 on one core with AVX-512 and VNNI, by least squares over 600
convolutions: half of the times are within 20 %, and int8 beats float or not as it says in 94 %.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from compressor.export.int8_operations import Int8Operation

Shapes = Mapping[ir.Value, tuple[int, ...]]
"""Of one example, of every value that a candidate reads or writes."""
_QUANTISED, _DEQUANTISED = 0.62, 0.60
"""Microseconds for a thousand numbers that change to int8, or back: rounding, and the layout of both sides."""
_START = 6.0
"""Microseconds for a node more."""
_TIMES: dict[str, tuple[float, float]] = {
    "Add": (0.30, 0.20), "Mul": (0.30, 0.35), "Concat": (0.40, 0.73), "Sigmoid": (0.15, 0.34),
    "GlobalAveragePool": (0.20, 0.10), "MaxPool": (0.35, 0.20), "Resize": (1.0, 3.0), "swish": (0.40, 0.55),
}  # fmt: skip
"""Microseconds for a thousand numbers, on floats and on int8."""
_CLEAR = 1.05
"""How much faster int8 has to be."""
_INFINITE = math.inf


def regions(
    operations: Sequence[Int8Operation], shapes: Shapes, weights: Mapping[Int8Operation, tuple[int, ...]]
) -> list[Int8Operation]:  # fmt: skip
    """The candidates that compute on int8, in order.

    Args:
        weights: The shapes of convolutions' weights.
    """
    cut = _Cut()
    writer = {operation.output: operation for operation in operations}
    for operation in operations:
        floats, int8 = times(operation, shapes, weights.get(operation))
        cut.add("int8", operation, floats)
        cut.add(operation, "float", int8 * _CLEAR)
    inner = {node: operation for operation in operations for node in operation.nodes}
    for value in dict.fromkeys(value for op in operations for value in (*op.inputs, op.output)):
        _charge(cut, value, writer.get(value), inner, shapes)
    chosen = cut.side("int8")
    found = [operation for operation in operations if operation in chosen]
    return _closed(found, operations)


def times(
    operation: Int8Operation, shapes: Shapes, weight: tuple[int, ...] | None
) -> tuple[float, float]:  # fmt: skip
    """Microseconds of a candidate on floats and on int8."""
    written = math.prod(shapes[operation.output])
    if operation.kind == "conv":
        assert weight is not None
        return convolution_times(weight, operation.node.attributes.get_int("group", 1), written // weight[0])
    name = "swish" if operation.kind == "swish" else operation.node.op_type
    numbers = max(written, *(math.prod(shapes[value]) for value in operation.inputs)) / 1000
    floats, int8 = _TIMES[name]
    n_nodes = 2 if operation.kind == "swish" else 1
    return _START + floats * numbers, n_nodes * _START + int8 * numbers


def convolution_times(weight: tuple[int, ...], group: int, positions: int) -> tuple[float, float]:
    """Microseconds on floats and on int8, of weights (outputs, inputs / group, …) at so many positions."""
    outputs, inputs, kernel = weight[0], weight[1], math.prod(weight[2:])
    n = positions / 1000
    if group > 1 and inputs == 1:
        return 8 + n * outputs * (0.21 + 0.019 * kernel), 10 + n * (1.8 * kernel + outputs * (0.11 + 0.034 * kernel))
    padded = 16 * math.ceil(outputs / group / 16) * group
    rows, spread = inputs * group, inputs * kernel if kernel > 1 else 0
    floats = 9 + n * (0.15 * padded + 0.054 * rows + 0.016 * inputs * kernel * padded)
    width = 4 * math.ceil(inputs * kernel / 4)
    int8 = 13 * group + n * (0.28 * padded + 0.034 * spread * group + 0.0026 * width * padded)
    return floats, int8 + n * (3.4 * kernel if kernel > 1 else 0)


def _charge(
    cut: _Cut, value: ir.Value, writer: Int8Operation | None, inner: Mapping[ir.Node, Int8Operation], shapes: Shapes
) -> None:  # fmt: skip
    """The costs of a value between its writer and its readers: each change is made once, however many need it."""
    numbers = math.prod(shapes[value]) / 1000
    there, back = _START + _QUANTISED * numbers, _START + _DEQUANTISED * numbers
    readers = {inner.get(node) for node, _ in value.uses()} - {writer}
    known = [reader for reader in readers if reader is not None and value in reader.inputs]
    known.sort(key=lambda reader: str(reader.node.name))
    on_floats = len(known) < len(readers) or value.is_graph_output()
    if writer is not None:
        if on_floats:
            cut.add(writer, "float", back)
        elif known:
            dequantised = ("dequantised", value)
            cut.add(writer, dequantised, back)
            for reader in known:
                cut.add(dequantised, reader, _INFINITE)
    if known:
        quantised = ("quantised", value)
        cut.add(quantised, "float" if writer is None else writer, there)
        for reader in known:
            cut.add(reader, quantised, _INFINITE)


def _closed(found: list[Int8Operation], operations: Sequence[Int8Operation]) -> list[Int8Operation]:
    """With the float convolutions that read int8 and write what only int8 reads: onnxruntime would round their weights
    itself, with one scale for all outputs."""
    int8 = {operation.output for operation in found}
    read = {value for operation in found for value in operation.inputs}
    more = {
        operation
        for operation in operations
        if operation.kind == "conv" and operation not in found and operation.inputs[0] in int8
        and operation.output in read and len(list(operation.output.uses())) == 1
    }  # fmt: skip
    return [operation for operation in operations if operation in more or operation in found]


class _Cut:
    """A minimum cut between "int8" and "float", by shortest augmenting paths."""

    def __init__(self) -> None:
        self.room: dict[object, dict[object, float]] = {}

    def add(self, a: object, b: object, capacity: float) -> None:
        """A cost that is paid where `a` is int8 and `b` is not."""
        ahead, behind = self.room.setdefault(a, {}), self.room.setdefault(b, {})
        ahead[b] = ahead.get(b, 0.0) + capacity
        behind.setdefault(a, 0.0)

    def side(self, source: object, sink: object = "float") -> set[object]:
        """All that lies on the source's side."""
        while True:
            came = self._reached(source)
            if sink not in came:
                return set(came)
            path, at = [], sink
            while at != source:
                path.append((came[at], at))
                at = came[at]
            least = min(self.room[a][b] for a, b in path)
            for a, b in path:
                self.room[a][b] -= least
                self.room[b][a] += least

    def _reached(self, source: object) -> dict[object, object]:
        came: dict[object, object] = {source: source}
        queue = deque([source])
        while queue:
            at = queue.popleft()
            for to, left in self.room.get(at, {}).items():
                if left > 1e-9 and to not in came:
                    came[to] = at
                    queue.append(to)
        return came
