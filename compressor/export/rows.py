"""Constants made of more or fewer rows at a time: by the nodes that make the whole, run over some of its rows.

    rows = Rows(builder, sizes)
    rows.share(rows.join(values), values)   # what values of one kind go through, they go through together
    if rows.cuttable(value):
        rows.cut(value, 3)                  # what used the value now uses three pieces, joined

Rows are a value's first axis. A row of what most operators give needs one row of an input; what is small, or alike for
all rows, stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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

    def of(self, dtype: ir.DataType) -> Size:
        """The same shape."""
        return Size(dtype, self.shape)


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
        self.cuts: set[ir.Node] = set()
        """The nodes that join the pieces of what was cut."""
        self._pieces: dict[tuple[ir.Value, int, int], ir.Value] = {}

    def cuttable(self, value: ir.Value) -> bool:
        """Whether a node makes the value, some rows by themselves, and nothing on the way to it but what is small would
        have to be made as a whole."""
        node = value.producer()
        return node is not None and self._needed(node) is not None and self._has_rows(value)

    def _has_rows(self, value: ir.Value) -> bool:
        """Whether some rows of a value can be had: made, read, or sliced off a small one."""
        size = self.sizes[value]
        if not size.shape or size.shape[0] < 2:
            return False
        node = value.producer()
        if node is None:
            return size.nbytes <= _SMALL or isinstance(value.const_value, ir.ExternalTensor)
        needed = self._needed(node)
        return size.nbytes <= _SMALL or (needed is not None and all(self._has_rows(_input(node, at)) for at in needed))

    def cut(self, value: ir.Value, pieces: int) -> None:
        """Replaces a value that is `cuttable` by `pieces` joined ones."""
        last, n = value.producer(), self.sizes[value].shape[0]
        assert last is not None
        self.b.before = last
        bounds = [n * at // pieces for at in range(pieces + 1)]
        made = [self._piece(value, *some) for some in pairwise(bounds)]
        joined = self._stacked(made)
        self.cuts.add(_maker(joined))
        value.replace_all_uses_with(joined)
        _remove_unused(self.b.graph, last)

    def kind(self, value: ir.Value) -> Hashable | None:
        """Equal for values that `join` can make together; None where a value is stored, or made in another way."""
        return self._kind(value) if self._maker_of_rows(value, top=True) else None

    def _kind(self, value: ir.Value, top: bool = True) -> Hashable:
        size, node = self.sizes[value], self._maker_of_rows(value, top)
        if node is None:
            return size.dtype, size.shape[1:]
        needed, inputs = self._needed(node) or [], list[Hashable]()
        for at, given in enumerate(node.inputs):
            if given is None or at in needed:
                inputs.append(None if given is None else self._kind(given, top=False))
            elif looks_up(node) and at == 0:
                inputs.append(("table", self.sizes[given].dtype, self.sizes[given].shape[1:]))
            else:
                inputs.append("shape" if at == 1 and node.op_type in _BY_SHAPE else given)
        attributes = tuple(sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items()))
        return node.op_type, node.domain, attributes, size.dtype, size.shape[1:], tuple(inputs)

    def _maker_of_rows(self, value: ir.Value, top: bool) -> ir.Node | None:
        """The node that makes a value, for it alone, of the same rows of other values."""
        node = value.producer()
        alone = node is not None and len(node.outputs) == 1 and (top or len(value.uses()) == 1)
        return node if alone and self.sizes[value].shape and self._needed(_maker(value)) else None

    def join(self, values: Sequence[ir.Value]) -> ir.Value:
        """All rows of values of one `kind`, in one go; each value's are where they come in turn."""
        return self._joined(values, top=True)

    def _joined(self, values: Sequence[ir.Value], top: bool = False) -> ir.Value:
        if self._maker_of_rows(values[0], top) is None:
            return self._stacked(values)
        nodes = [_maker(value) for value in values]
        inputs = list(nodes[0].inputs)
        for at in self._needed(nodes[0]) or []:
            inputs[at] = self._joined([_input(node, at) for node in nodes])
        if looks_up(nodes[0]):
            inputs[:2] = self._one_table(nodes, inputs[1])
        return self._again(nodes[0], inputs, sum(self.sizes[value].shape[0] for value in values))

    def _one_table(self, nodes: Sequence[ir.Node], index: ir.Value | None) -> list[ir.Value | None]:
        """The tables of look-ups one after another, and the joined index into them."""
        tables = list(dict.fromkeys(_input(node, 0) for node in nodes))
        assert index is not None
        if len(tables) == 1:
            return [tables[0], index]
        entries = [self.sizes[table].shape[0] for table in tables]
        starts = dict(zip(tables, np.cumsum([0, *entries]), strict=False))
        offsets = self._by_row(
            [starts[_input(node, 0)] for node in nodes],
            [self.sizes[_input(node, 1)].shape[0] for node in nodes], self.sizes[index],
        )  # fmt: skip
        narrow = _maker(index).inputs[0] if _maker(index).op_type == "Cast" else None
        even = len(set(entries)) == 1 and entries[0].bit_count() == 1 and sum(entries) <= 1 << 16
        if narrow is None or not even or self.sizes[narrow].dtype != ir.DataType.UINT16 or not self._has_bitwise:
            return [self._stacked(tables), self._made_by("Add", index, offsets)]
        offsets = self._noted(self.b.cast(offsets, ir.DataType.UINT16), self.sizes[offsets].of(ir.DataType.UINT16))
        moved = self._made_by("BitwiseOr", narrow, offsets)
        _remove_unused(self.b.graph, _maker(index))
        return [self._stacked(tables), self._noted(self.b.cast(moved, self.sizes[index].dtype), self.sizes[index])]

    @property
    def _has_bitwise(self) -> bool:
        return self.b.graph.opset_imports.get("", 0) >= 18

    def _made_by(self, operator: str, value: ir.Value, other: ir.Value) -> ir.Value:
        return self._noted(self.b.op(operator, value, other), self.sizes[value])

    def _by_row(self, numbers: Sequence[int], counts: Sequence[int], like: Size) -> ir.Value:
        """Each number for so many rows: the type of `like`, and its shape with 1 for all axes but the first."""
        b, n = self.b, sum(counts)
        kind = np.int64 if like.dtype == ir.DataType.INT64 else np.int32
        flat, column = Size(like.dtype, (n,)), Size(like.dtype, (n, *[1] * (len(like.shape) - 1)))
        none = self._noted(b.op("Expand", b.constant(np.zeros(1, kind)), b.integers(n)), flat)
        places, steps = b.integers(*np.cumsum(counts)[:-1].tolist()), b.constant(np.diff(numbers).astype(kind))
        changes = self._noted(b.op("ScatterElements", none, places, steps, axis=0), flat)
        passed = self._noted(b.op("CumSum", changes, b.constant(np.array(0, np.int64))), flat)
        return self._noted(b.reshape(passed, *column.shape), column)

    def share(self, joined: ir.Value, values: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Puts the rows of `joined` in the place of values, which come in turn; what is there now."""
        counts, old = [self.sizes[value].shape[0] for value in values], [_maker(value) for value in values]
        pieces = [joined]
        if len(values) > 1:
            pieces = self.b.ops("Split", joined, self.b.integers(*counts), outputs=len(values), axis=0)
        for value, piece in zip(values, pieces, strict=True):
            self._noted(piece, self.sizes[value])
            value.replace_all_uses_with(piece)
        for node in old:
            _remove_unused(self.b.graph, node)
        return pieces

    def _again(self, node: ir.Node, inputs: list[ir.Value | None], rows: int) -> ir.Value:
        """What a node gives for other inputs, so many rows of them."""
        if node.op_type in _BY_SHAPE:
            inputs[1] = self.b.integers(rows, *self.sizes[node.outputs[0]].shape[1:])
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        made = self.b.op(node.op_type, *inputs, domain=node.domain, **attributes)
        return self._noted(made, self._rows_of(node.outputs[0], rows))

    def _stacked(self, values: Sequence[ir.Value]) -> ir.Value:
        made = self.b.stacked(values)
        return self._noted(made, self._rows_of(values[0], sum(self.sizes[value].shape[0] for value in values)))

    def _rows_of(self, like: ir.Value, rows: int) -> Size:
        size = self.sizes[like]
        return Size(size.dtype, (rows, *size.shape[1:]))

    def _noted(self, made: ir.Value, size: Size) -> ir.Value:
        self.sizes.note(made, size)
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
            return self._noted(some, self._rows_of(value, stop - start))
        inputs = [
            self._piece(given, start, stop) if at in needed and given is not None else given
            for at, given in enumerate(node.inputs)
        ]
        return self._again(node, inputs, stop - start)

    def _stored(self, value: ir.Value, stored: ir.ExternalTensor, start: int, stop: int) -> ir.Value:
        some, row = self._rows_of(value, stop - start), self.sizes[value].nbytes // self.sizes[value].shape[0]
        return self.b.view(value, stored, (stored.offset or 0) + start * row, some.nbytes, some.shape)


def looks_up(node: ir.Node) -> bool:
    """Whether rows of a table are found by number."""
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0


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
    """Removes a node that nobody uses, and the nodes that were there for it alone."""
    if any(value.uses() for value in node.outputs):
        return
    makers = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for maker in makers:
        if maker is not None and maker.graph is not None:
            _remove_unused(graph, maker)
