"""Constants made of more or fewer rows at a time: by the nodes that make the whole, run over some of its rows.

    rows = Rows(builder, sizes)
    rows.join(concat)           # what its inputs go through alike, they go through together
    if rows.cuttable(value):
        rows.cut(value, 3)      # what used the value now uses three pieces, joined

Rows are a value's first axis. A row of what most operators give needs one row of an input; what is small, or alike for
all rows, stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compressor.export.builder import GraphBuilder


@dataclass(frozen=True)
class Size:
    """Type, shape and bytes of a constant, known before anything runs."""

    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 0 if self.dtype == ir.DataType.STRING else math.ceil(math.prod(self.shape) * self.dtype.itemsize)


class Sizes:
    """Of a graph's constants, whether they are stored or made by nodes."""

    def __init__(self, made: dict[str, Size]) -> None:
        self._made = made

    def __contains__(self, value: ir.Value) -> bool:
        return value.const_value is not None or value.name in self._made

    def __getitem__(self, value: ir.Value) -> Size:
        stored = value.const_value
        return self._made[str(value.name)] if stored is None else Size(stored.dtype, tuple(stored.shape.numpy()))

    def note(self, value: ir.Value, size: Size) -> None:
        """Of a new value."""
        self._made[str(value.name)] = size


_BY_ELEMENT = ("Cast", "Mul", "Add", "Sub", "Div", "BitwiseOr", "Round", "Min")
_BY_SHAPE = ("Reshape", "Expand")
"""Operators whose second input is the shape of what they give."""
_SMALL = 1 << 16
"""Bytes of a constant whose rows are sliced off it."""


class Rows:
    """Works on the constants of `builder`'s graph; `sizes` gets those that it makes."""

    def __init__(self, builder: GraphBuilder, sizes: Sizes) -> None:
        self.b, self.sizes = builder, sizes
        self._pieces: dict[tuple[ir.Value, int, int], ir.Value] = {}

    def cuttable(self, value: ir.Value) -> bool:
        """Whether no node on the way to the value would have to be run as a whole, but for small ones."""
        size = self.sizes[value]
        if not size.shape or size.shape[0] < 2:
            return False
        node = value.producer()
        if node is None:
            return size.nbytes <= _SMALL or isinstance(value.const_value, ir.ExternalTensor)
        needed = self._needed(node)
        return size.nbytes <= _SMALL or (
            needed is not None and all(self.cuttable(_input(node, at)) for at in needed)
        )

    def cut(self, value: ir.Value, pieces: int) -> None:
        """Replaces a value that is `cuttable` by `pieces` joined ones."""
        last, n = value.producer(), self.sizes[value].shape[0]
        assert last is not None
        self.b.before = last
        bounds = [n * at // pieces for at in range(pieces + 1)]
        made = [self._piece(value, *some) for some in zip(bounds, bounds[1:], strict=False)]
        value.replace_all_uses_with(self._stacked(made))
        _remove_unused(self.b.graph, last)

    def join(self, concat: ir.Node) -> None:
        """Of rows joined last, makes rows joined first, as far as they go through the same nodes."""
        values = [_input(concat, at) for at in range(len(concat.inputs))]
        if self._alike(values):
            self.b.before = concat
            concat.outputs[0].replace_all_uses_with(self._joined(values))
            _remove_unused(self.b.graph, concat)

    def _joined(self, values: Sequence[ir.Value]) -> ir.Value:
        needed = self._alike(values)
        if not needed:
            return self._stacked(values)
        nodes = [_maker(value) for value in values]
        inputs = list(nodes[0].inputs)
        for at in needed:
            inputs[at] = self._joined([_input(node, at) for node in nodes])
        rows = sum(self.sizes[value].shape[0] for value in values)
        return self._again(nodes[0], inputs, rows)

    def _alike(self, values: Sequence[ir.Value]) -> list[int]:
        """The inputs to join of the nodes that make these values; none where they are not alike but for these."""
        nodes = [value.producer() for value in values]
        first = nodes[0]
        needed = None if first is None else self._needed(first)
        if first is None or not needed or len({self.sizes[value].shape[1:] for value in values}) > 1:
            return []
        for node, value in zip(nodes, values, strict=True):
            if node is None or len(value.uses()) != 1 or self._needed(node) != needed:
                return []
            same = (node.op_type, node.domain, node.attributes) == (first.op_type, first.domain, first.attributes)
            if not same or len(node.inputs) != len(first.inputs):
                return []
            for at, (given, other) in enumerate(zip(node.inputs, first.inputs, strict=True)):
                if at in needed and not self._stackable(given, other):
                    return []
                if at not in needed and given is not other and not (at == 1 and node.op_type in _BY_SHAPE):
                    return []
        return needed

    def _stackable(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        if one is None or other is None:
            return False
        a, b = self.sizes[one], self.sizes[other]
        return (a.dtype, a.shape[1:]) == (b.dtype, b.shape[1:])

    def _again(self, node: ir.Node, inputs: list[ir.Value | None], rows: int) -> ir.Value:
        """What a node gives for other inputs, so many rows of them."""
        if node.op_type in _BY_SHAPE:
            inputs[1] = self.b.integers(rows, *self.sizes[node.outputs[0]].shape[1:])
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        made = self.b.op(node.op_type, *inputs, domain=node.domain, **attributes)
        return self._noted(made, node.outputs[0], rows)

    def _stacked(self, values: Sequence[ir.Value]) -> ir.Value:
        rows = sum(self.sizes[value].shape[0] for value in values)
        return self._noted(self.b.op("Concat", *values, axis=0), values[0], rows)

    def _noted(self, made: ir.Value, like: ir.Value, rows: int) -> ir.Value:
        """`made`, which is like another value but for its rows."""
        size = self.sizes[like]
        self.sizes.note(made, Size(size.dtype, (rows, *size.shape[1:])))
        return made

    def _needed(self, node: ir.Node) -> list[int] | None:
        """The inputs of which a row of the output needs the same row alone; None where it may need others."""
        out, first = self.sizes[node.outputs[0]].shape, self.sizes[_input(node, 0)].shape
        axes: list[int] = []
        match node.op_type:
            case operator if operator in _BY_ELEMENT:
                shapes = [self.sizes[value].shape for value in node.inputs if value is not None]
                return [at for at, shape in enumerate(shapes) if len(shape) == len(out) and shape[0] == out[0]]
            case "Gather":
                by_index = node.attributes.get_int("axis", 0) % len(first) == 0
                return [1] if by_index and self.sizes[_input(node, 1)].shape[:1] == out[:1] else None
            case "Expand":
                return [0] if len(first) == len(out) and first[0] == out[0] else []
            case "Concat":
                axes = [node.attributes.get_int("axis", 0) % len(out)]
            case "Slice" | "Unsqueeze" | "ReduceSum":
                stated = _numbers(node, 3 if node.op_type == "Slice" else 1)
                rank = len(out) if node.op_type == "Unsqueeze" else len(first)
                axes = [0] if stated is None else [int(axis) % rank for axis in stated]
            case "Pad":
                stated = _numbers(node, 1)
                axes = [0] if stated is None else [int(at) % len(first) for at in np.flatnonzero(stated)]
            case "Reshape":
                axes = [0] * (first[:1] != out[:1])
            case _:
                return None
        return None if 0 in axes else list(range(len(node.inputs) if node.op_type == "Concat" else 1))

    def _piece(self, value: ir.Value, start: int, stop: int) -> ir.Value:
        key = (value, start, stop)
        if key not in self._pieces:
            self._pieces[key] = self._made(value, start, stop)
        return self._pieces[key]

    def _made(self, value: ir.Value, start: int, stop: int) -> ir.Value:
        node, stored = value.producer(), value.const_value
        if node is None and isinstance(stored, ir.ExternalTensor):
            return self._stored(value, stored, start, stop)
        needed = None if node is None else self._needed(node)
        if node is None or needed is None:
            some = self.b.op("Slice", value, *(self.b.integers(number) for number in (start, stop, 0)))
            return self._noted(some, value, stop - start)
        inputs = [
            self._piece(given, start, stop) if at in needed and given is not None else given
            for at, given in enumerate(node.inputs)
        ]
        return self._again(node, inputs, stop - start)

    def _stored(self, value: ir.Value, stored: ir.ExternalTensor, start: int, stop: int) -> ir.Value:
        shape, nbytes = self.sizes[value].shape, self.sizes[value].nbytes
        row = nbytes // shape[0]
        offset, some = (stored.offset or 0) + start * row, (stop - start, *shape[1:])
        stem = str(value.name).partition("@")[0]
        label = f"{stem}@{offset}:{stored.dtype.name.lower()}{'x'.join(map(str, some))}"
        return self.b.external(label, str(stored.location), offset, (stop - start) * row, stored.dtype, some)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _input(node: ir.Node, at: int) -> ir.Value:
    value = node.inputs[at]
    assert value is not None
    return value


def _numbers(node: ir.Node, at: int) -> np.ndarray | None:
    """A constant input of a few numbers; None where it is not there, or made by nodes."""
    value = node.inputs[at] if len(node.inputs) > at else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Removes a node that nobody uses, and what was there for it alone."""
    if any(value.uses() for value in node.outputs):
        return
    inputs = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in inputs:
        producer = value.producer()
        if producer is not None:
            _remove_unused(graph, producer)
        elif not value.uses() and value.name in graph.initializers:
            del graph.initializers[value.name]
