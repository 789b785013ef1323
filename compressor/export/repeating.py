"""The graph of a network's first blocks becomes that of all, where the others only repeat what was traced.

Tracing takes seconds for each block. So of a row of equal blocks (or equal groups of them) those are traced that show
the period twice (`graph.periods`). What the graph computes between the weights of one period and those of the next is
then copied for each further one, over that one's weights. The two that were traced must be the same node by node, for
the copies to be right: where they are not, as where a constant counts blocks, nothing is done and all is traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from compressor.core.tensors import EncodedTensors
from compressor.graph.periods import Period

REPEATED = "repeated"
"""In the metadata of a graph that has blocks which were not traced."""
_TENSOR = "tensor"
"""Where inputs that stand for weights note the tensor's name (export/tracing.py)."""


@dataclass(frozen=True)
class Ends:
    """Where a graph's inputs and outputs are those of blocks: so many before them, and so many of each block."""

    inputs: int
    outputs: int
    per_block: int = 0


@dataclass
class _Twins:
    """What of the second period stands for what of the first: its nodes' outputs, and what comes from the one before.

    taken   value of before the first period -> value of the first one that the second takes in its place
    """

    nodes: list[ir.Node] = field(default_factory=list)
    second: dict[ir.Value, ir.Value] = field(default_factory=dict)
    taken: dict[ir.Value, ir.Value] = field(default_factory=dict)


def repeat(graph: ir.Graph, period: Period, tensors: EncodedTensors, ends: Ends) -> bool:
    """Adds the blocks that are missing in a graph of the first `period.seen`; whether it could.

    Args:
        tensors: Of which the weights' names must be.
    """
    blocks = _Blocks(graph, period, ends)
    twins = blocks.twins()
    if twins is None:
        return False
    if any(name in tensors.tied or name not in tensors for name in blocks.further_weights(twins)):
        return False
    blocks.add(twins)
    graph.metadata_props[REPEATED] = "yes"
    return True


class _Blocks:
    def __init__(self, graph: ir.Graph, period: Period, ends: Ends) -> None:
        self.graph, self.period, self.ends = graph, period, ends
        self.first, self.second = period.start, period.start + period.length
        noted = [value for value in graph.inputs if _TENSOR in value.metadata_props]
        self.weights = {value: value.metadata_props[_TENSOR] for value in noted}
        per, before = ends.per_block, ends.inputs
        pasts = graph.inputs[before : before + per * period.seen]
        self.pasts = {value: divmod(at, per) for at, value in enumerate(pasts)} if per else {}
        kept = graph.outputs[ends.outputs :]
        self.outputs = {value: divmod(at, per) for at, value in enumerate(kept)} if per else {}
        self.depth: dict[ir.Value, int] = {value: at for value, (at, _) in self.pasts.items()}
        for value, name in self.weights.items():
            at = self._block_of(name)
            if at is not None:
                self.depth[value] = at
        self.sizes = self._sizes_of_pasts()

    def _sizes_of_pasts(self) -> set[ir.Node]:
        """What tells how long the past is, or how many texts there are: of the first block's now, since all are as
        long. It counts for none of a block's."""
        found: set[ir.Node] = set()
        for value in self.pasts:
            for node, _ in list(value.uses()):
                if node.op_type == "Shape" and _of_free_axis(node):
                    node.replace_input_with(0, next(iter(self.pasts)))
                    found.add(node)
        return found

    def _block_of(self, name: str) -> int | None:
        for at, block in enumerate(self.period.names):
            if name.startswith(f"{block}."):
                return at
        return None

    def _moved(self, name: str, by: int) -> str | None:
        """The name of a block's weight `by` blocks later."""
        at = self._block_of(name)
        if at is None or at + by >= len(self.period.names):
            return None
        return f"{self.period.names[at + by]}{name.removeprefix(self.period.names[at])}"

    def twins(self) -> _Twins | None:
        """The second period as a copy of the first; None where it is none."""
        periods = self._periods()
        if periods is None or not periods[0] or len(periods[1]) < len(periods[0]):
            return None
        first, second = periods[0], periods[1][: len(periods[0])]
        found = _Twins(second)
        inside = {value for node in first for value in node.outputs}
        for a, b in zip(first, second, strict=True):
            if _signature(a) != _signature(b) or not _same_attributes(a, b):
                return None
            for x, y in zip(a.inputs, b.inputs, strict=True):
                if not self._fits(x, y, found, inside):
                    return None
            found.second |= dict(zip(a.outputs, b.outputs, strict=True))
        return found if self._is_closed(first, second, found) else None

    def _periods(self) -> tuple[list[ir.Node], list[ir.Node]] | None:
        """The nodes of both periods in order; what comes after the blocks may be at the end of the second's."""
        tail: set[ir.Value] = set()
        periods: tuple[list[ir.Node], list[ir.Node]] = ([], [])
        for node in self.graph:
            if any(attribute.type is ir.AttributeType.GRAPHS for attribute in node.attributes.values()):
                return None
            inputs = [value for value in node.inputs if value is not None]
            depth = max((self.depth.get(value, -1) for value in inputs if node not in self.sizes), default=-1)
            foreign = any(value in self.weights and value not in self.depth for value in inputs)
            if any(value in tail for value in inputs) or (foreign and depth >= 0):
                tail.update(node.outputs)
                continue
            self.depth |= dict.fromkeys(node.outputs, depth)
            if depth >= self.first:
                periods[depth >= self.second].append(node)
        return periods

    def _fits(self, x: ir.Value | None, y: ir.Value | None, found: _Twins, inside: set[ir.Value]) -> bool:
        """Whether the second period takes `y` where the first takes `x`."""
        if x is None or y is None:
            return x is y
        if x in inside:
            return found.second.get(x) is y
        if x in self.weights and x in self.depth:
            return self.weights.get(y) == self._moved(self.weights[x], self.period.length)
        if x in self.pasts:
            at, part = self.pasts[x]
            return self.pasts.get(y) == (at + self.period.length, part)
        if y in inside:
            return found.taken.setdefault(x, y) is y
        return x is y or _same_constant(x, y)

    def _is_closed(self, first: list[ir.Node], second: list[ir.Node], found: _Twins) -> bool:
        """Whether the first period's values go to the second alone, or out of the graph as its block's, and in each
        output of a block the two are the same."""
        inner, outputs, ends = {*first, *second}, self.outputs, self.graph.outputs[: self.ends.outputs]
        for node in first:
            for value in node.outputs:
                if value in ends or not {user for user, _ in value.uses()} <= inner:
                    return False
                if (value in outputs) != (found.second[value] in outputs):
                    return False
                if value in outputs:
                    at, part = outputs[value]
                    if outputs[found.second[value]] != (at + self.period.length, part):
                        return False
        return len(set(found.taken.values())) == len(found.taken)

    def further_weights(self, twins: _Twins) -> list[str]:
        """The names of the weights that are to be added."""
        used = {self.weights[value] for node in twins.nodes for value in node.inputs if value in self.weights}
        of_blocks = [name for name in used if self._block_of(name) is not None]
        return [str(self._moved(name, by)) for by in self._shifts() for name in of_blocks]

    def _shifts(self) -> range:
        length = self.period.length
        return range(length, len(self.period.names) - self.second, length)

    def add(self, twins: _Twins) -> None:
        """Copies the second period for each that is missing; what came after it comes after the last."""
        graph, own = self.graph, set(twins.nodes)
        followers = {
            value: [(user, at) for user, at in value.uses() if user not in own]
            for node in twins.nodes for value in node.outputs
        }  # fmt: skip
        before = {value: value for value in twins.second.values()}
        for by in self._shifts():
            given: dict[ir.Value | None, ir.Value | None] = {None: None}
            given |= {value: before[same] for value, same in twins.second.items()}
            given |= self._new_pasts(by)
            for node in twins.nodes:
                given |= {
                    value: self._new_weight(value, by) for value in node.inputs if self._is_of_block(value, given)
                }
                copy = ir.Node(
                    node.domain, node.op_type, [given.get(value, value) for value in node.inputs],
                    _copies(node.attributes.values()), num_outputs=len(node.outputs), name=f"{node.name}.{by}",
                )  # fmt: skip
                for value, made in zip(node.outputs, copy.outputs, strict=True):
                    made.name, made.type, made.shape = f"{value.name}.{by}", value.type, value.shape
                    given[value] = made
                graph.append(copy)
            before = {value: made for value in before if (made := given[value]) is not None}
            self._add_outputs(before)
        for value, users in followers.items():
            for user, at in users:
                user.replace_input_with(at, before[value])
        for at, value in enumerate(graph.outputs[: self.ends.outputs]):
            graph.outputs[at] = before.get(value, value)
        graph.sort()

    def _is_of_block(self, value: ir.Value | None, given: Mapping[ir.Value | None, ir.Value | None]) -> bool:
        return value in self.weights and value in self.depth and value not in given

    def _new_weight(self, value: ir.Value | None, by: int) -> ir.Value:
        assert value is not None
        name = str(self._moved(self.weights[value], by))
        found = self._new_input(value, name, len(self.graph.inputs))
        found.metadata_props[_TENSOR] = name
        return found

    def _new_pasts(self, by: int) -> dict[ir.Value | None, ir.Value | None]:
        """What the second period's blocks are given of before, for those `by` blocks later."""
        found: dict[ir.Value | None, ir.Value | None] = {}
        for value, (at, part) in self.pasts.items():
            if at >= self.second:
                place = self.ends.inputs + (at + by) * self.ends.per_block + part
                found[value] = self._new_input(value, f"{at + by}.{part}", place)
        return found

    def _new_input(self, like: ir.Value, name: str, place: int) -> ir.Value:
        found = ir.Value(name=f"repeated.{name}", type=like.type, shape=like.shape)
        self.graph.inputs.insert(place, found)
        return found

    def _add_outputs(self, copies: Mapping[ir.Value, ir.Value]) -> None:
        found = [(place, value) for value, place in self.outputs.items() if place[0] >= self.second]
        for _, value in sorted(found, key=lambda each: each[0]):
            self.graph.outputs.append(copies[value])


def _copies(attributes: Iterable[ir.Attr]) -> list[ir.Attr]:
    """Attributes for another node; a graph belongs to one alone."""
    graph = ir.AttributeType.GRAPH
    return [
        ir.AttrGraph(each.name, each.as_graph().clone(allow_outer_scope_values=True)) if each.type is graph else each
        for each in attributes
    ]


def _of_free_axis(node: ir.Node) -> bool:
    """Whether a Shape is of one axis of a past that is not fixed: texts, or what was read."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return start is not None and end is not None and (start.as_int(), end.as_int()) in ((0, 1), (2, 3))


def _signature(node: ir.Node) -> tuple[str, str, int, int]:
    return node.op_type, node.domain, len(node.inputs), len(node.outputs)


def _same_attributes(a: ir.Node, b: ir.Node) -> bool:
    if a.attributes.keys() != b.attributes.keys():
        return False
    return all(_same(a.attributes[name].value, b.attributes[name].value) for name in a.attributes)


def _same(a: object, b: object) -> bool:
    if isinstance(a, ir.TensorProtocol) and isinstance(b, ir.TensorProtocol):
        return _same_arrays(a, b)
    if isinstance(a, ir.Graph) and isinstance(b, ir.Graph):
        return _same_bodies(a, b)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str | bytes):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _same_bodies(a: ir.Graph, b: ir.Graph) -> bool:
    """Whether two graphs within nodes, as loops', compute the same, of their own inputs and constants alone."""
    if [len(a), len(a.inputs), len(a.outputs)] != [len(b), len(b.inputs), len(b.outputs)]:
        return False
    twins = dict(zip(a.inputs, b.inputs, strict=True))
    for x, y in zip(a, b, strict=True):
        if _signature(x) != _signature(y) or not _same_attributes(x, y):
            return False
        if not all(_are_twins(p, q, twins) for p, q in zip(x.inputs, y.inputs, strict=True)):
            return False
        twins |= dict(zip(x.outputs, y.outputs, strict=True))
    return all(_are_twins(p, q, twins) for p, q in zip(a.outputs, b.outputs, strict=True))


def _are_twins(x: ir.Value | None, y: ir.Value | None, twins: Mapping[ir.Value, ir.Value]) -> bool:
    if x is None or y is None:
        return x is y
    return twins[x] is y if x in twins else _same_constant(x, y)


def _same_constant(x: ir.Value, y: ir.Value) -> bool:
    """Whether both are initialisers of the same content."""
    a, b = x.const_value, y.const_value
    return a is not None and b is not None and _same_arrays(a, b)


def _same_arrays(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy())
