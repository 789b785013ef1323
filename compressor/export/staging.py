"""Constants that onnxruntime folds when it loads a graph, in stages: each is freed before the next is made.

onnxruntime folds constants in at most ten passes over a graph, and frees what the nodes of a pass gave only when the
pass ends. Left alone, everything folds in the first: every look-up of every layer is in memory at once. Here what folds
is shared out among the passes. A constant of stage s goes through a Reshape whose target is known only in pass s: it is
multiplied by a *gate*, a one that is the shape of an If's output, and shapes of outputs of If are inferred between
passes, not within one. The branches of that If make their output from the gate before, so that gates open one by one.
All of it is dead once the last gate has opened, and onnxruntime drops it: what runs is the graph without gates, to the
bit.

    staged(model, "default")      # changes it, where enough folds to be worth it

Within a stage, constants that are made alike are made at once: the codes of all tensors of so many columns are put one
after another, looked up by the same few nodes, and shared out again (`rows`). A node costs onnxruntime a tenth of a
millisecond at load, and a weight took ten. A table that is more than a stage's share is cut by rows, each piece in a
stage of its own, and joined at last. Graphs without look-ups have little to fold and get no gates.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from compressor.export.builder import GraphBuilder
from compressor.export.forms import Mode
from compressor.export.rows import Rows, Size, Sizes, looks_up
from compressor.export.shares import STAGES, WORTH_IT, Folding, Share, folding_of, share_out

_TOGETHER = 1 << 28
"""Bytes that are made at once at most, well below what onnxruntime still folds."""
_SMALL = 50
"""Nodes that together make less than this part of their unit need none either."""
_OLDEST_OPSET = 13
_STEM = "stage."
_SOURCES = (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32)


@dataclass(eq=False, kw_only=True)
class Unit(Share):
    """Nodes that fold into one value: what is between it and the stored constants, or the units before it.

    exit     the value that something else uses
    order    when what uses it runs
    nodes    the last one first
    """

    exit: ir.Value
    order: int
    nodes: list[ir.Node] = field(default_factory=list)


def staged(model: ir.Model, mode: Mode) -> Folding:
    """Puts what folds in a graph into stages, where there is enough of it; says what folding takes then."""
    graph, sizes = model.graph, sizes_of(model)
    units = units_of(graph, sizes)
    source = next((value for value in graph.inputs if value.dtype in _SOURCES), None)
    old = graph.opset_imports.get("", 0) < _OLDEST_OPSET
    if mode == "standard" or sum(unit.made for unit in units) < WORTH_IT or old or source is None:
        return folding_of(units)
    builder = GraphBuilder(graph, before=graph[0], stem=_STEM)
    rows = Rows(builder, sizes)
    if any(looks_up(node) for unit in units for node in unit.nodes):
        units = _cut(units, rows)
        share_out(units, STAGES)
    together = _together(units, rows)
    graph.sort()
    units = units_of(graph, sizes, rows.cuts, together)
    _Gates(builder, source, sizes).shut(units)
    graph.sort()
    for name in [name for name, value in graph.initializers.items() if not value.uses() and value not in graph.outputs]:
        del graph.initializers[name]
    for node in graph:
        if str(node.name).startswith(f"node_{_STEM}"):
            node.name = None
    return folding_of(units)


def _cut(units: list[Unit], rows: Rows) -> list[Unit]:
    """Cuts what is more than a stage's share; the units that there are then."""
    share = sum(unit.made for unit in units) // STAGES
    for unit in units:
        pieces = -(-unit.made // share)
        gains = unit.made > 2 * unit.kept  # the pieces and what they are joined to are there together
        if pieces > 1 and gains and rows.cuttable(unit.exit):
            rows.cut(unit.exit, pieces)
    rows.b.graph.sort()
    return units_of(rows.b.graph, rows.sizes, rows.cuts)


def _together(units: list[Unit], rows: Rows) -> dict[ir.Value, int]:
    """Makes at once what is made alike in a stage; the stages of all values that units end in."""
    stages = {unit.exit: unit.stage for unit in units}
    alike: dict[tuple[int, Hashable], list[tuple[Unit, list[ir.Value]]]] = {}
    for unit in units:
        values = _parts(unit)
        kinds = {rows.kind(value) for value in values}
        if len(kinds) == 1 and None not in kinds:
            alike.setdefault((unit.stage, kinds.pop()), []).append((unit, values))
    for (stage, _), found in alike.items():
        for some in _batches(found):
            values = [value for _, each in some for value in each]
            if len(values) == 1:
                continue
            rows.b.before = rows.b.graph[0]
            joined, exits = rows.join(values), [unit.exit for unit, _ in some]
            stages |= dict.fromkeys(rows.share(joined, exits), stage)
    return stages


def _parts(unit: Unit) -> list[ir.Value]:
    """What a unit puts together, row by row; itself where it does not."""
    last = unit.nodes[0]
    inner = {value for node in unit.nodes for value in node.outputs}
    values = [value for value in last.inputs if value is not None]
    return values if _joins_rows(last) and inner.issuperset(values) else [unit.exit]


def _batches(found: list[tuple[Unit, list[ir.Value]]]) -> Iterator[list[tuple[Unit, list[ir.Value]]]]:
    """In turn, so that none makes more than `_TOGETHER` bytes, but for those that do by themselves."""
    some, made = [], 0
    for unit, values in found:
        if some and made + unit.made > _TOGETHER:
            yield some
            some, made = [], 0
        some.append((unit, values))
        made += unit.made
    yield some


def sizes_of(model: ir.Model) -> Sizes:
    """Of what nodes make whatever the inputs are, and of what is stored."""
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    found = {}
    for info in proto.graph.value_info:
        kind = info.type.tensor_type
        if kind.elem_type and kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[info.name] = Size(ir.DataType(kind.elem_type), tuple(dim.dim_value for dim in kind.shape.dim))
    return Sizes(found)


def units_of(
    graph: ir.Graph, sizes: Sizes, cuts: Container[ir.Node] = (), stages: Mapping[ir.Value, int] | None = None
) -> list[Unit]:
    """What folds, in the order in which it is used; what is joined of cut values in units of its own.

    Args:
        stages: Of the units that end in these values; of others it is the first.
    """
    position = {node: at for at, node in enumerate(graph)}
    folded = _folded(graph, sizes)
    known, of = set(folded), dict[ir.Node, Unit]()
    for node in reversed(folded):
        users = [user for value in node.outputs for user, _ in value.uses()]
        owners = {of[user] for user in users if user in known}
        inner = len(owners) == 1 and all(user in known and user not in cuts for user in users)
        if not inner:
            order = min((of[user].order if user in known else position.get(user, 0) for user in users), default=0)
            final = any(user not in known for user in users)
            of[node] = Unit(exit=node.outputs[0], order=order, final=final)
            for owner in owners:
                owner.before.add(of[node])
        else:
            of[node] = owners.pop()
        made = sum(sizes[value].nbytes for value in node.outputs)
        of[node].nodes.append(node)
        of[node].made += made
        of[node].kept += 0 if inner else made
        if stages is not None and not inner:
            of[node].stage = max(stages.get(value, 0) for value in node.outputs)
    return sorted(dict.fromkeys(of[node] for node in folded), key=lambda unit: unit.order)


def _folded(graph: ir.Graph, sizes: Sizes) -> list[ir.Node]:
    """The nodes whose inputs are all constant, in order."""
    constant, outputs = set(graph.initializers.values()) - set(graph.inputs), set(graph.outputs)
    found = []
    for node in graph:
        nested = any(
            entry.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for entry in node.attributes.values()
        )
        known = all(value in sizes and value not in outputs for value in node.outputs)
        if node.inputs and known and not nested and all(value is None or value in constant for value in node.inputs):
            constant.update(node.outputs)
            found.append(node)
    return found


def _joins_rows(node: ir.Node) -> bool:
    return node.op_type == "Concat" and node.attributes.get_int("axis", 0) == 0


class _Gates:
    """The gates of a graph, and what is behind them."""

    def __init__(self, builder: GraphBuilder, source: ir.Value, sizes: Sizes) -> None:
        self.b, self.sizes = builder, sizes
        self.b.before = builder.graph[0]
        assert source.dtype is not None
        self._source, self._dtype = source, source.dtype
        self._scalar: ir.Value | None = None
        self._condition: ir.Value | None = None
        self._gates: list[ir.Value] = []
        self._targets: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
        self._shut: dict[tuple[ir.Value, int], ir.Value] = {}

    def shut(self, units: list[Unit]) -> None:
        """Puts each unit behind the gate of its stage."""
        for unit in units:
            if unit.stage:
                for node in list(self._leaves(unit)):
                    at = self._lightest(node)
                    value = node.inputs[at]
                    assert value is not None
                    node.replace_input_with(at, self._behind(value, unit.stage))

    def _leaves(self, unit: Unit) -> Iterator[ir.Node]:
        """The nodes that would fold at once, but for small ones."""
        inner = {value for node in unit.nodes for value in node.outputs}
        inner |= {value for each in unit.before if isinstance(each, Unit) for value in each.nodes[0].outputs}
        left, small = unit.made // _SMALL, set[ir.Node]()
        for node in sorted(unit.nodes, key=self._made):
            left -= self._made(node)
            if left < 0:
                break
            small.add(node)
        for node in unit.nodes:
            waits = any(value in inner and value.producer() not in small for value in node.inputs if value)
            if node not in small and not waits:
                yield node

    def _made(self, node: ir.Node) -> int:
        """Bytes of what a node gives."""
        return sum(self.sizes[value].nbytes for value in node.outputs)

    def _lightest(self, node: ir.Node) -> int:
        """The input with the fewest bytes."""
        return min((self.sizes[value].nbytes, at) for at, value in enumerate(node.inputs) if value is not None)[1]

    def _behind(self, value: ir.Value, stage: int) -> ir.Value:
        key = (value, stage)
        if key not in self._shut:
            self._shut[key] = self.b.op("Reshape", value, self._target(stage, self.sizes[value].shape))
        return self._shut[key]

    def _target(self, stage: int, shape: tuple[int, ...]) -> ir.Value:
        key = (stage, shape)
        if key not in self._targets:
            self._targets[key] = self.b.op("Mul", self.b.integers(*shape), self._gate(stage))
        return self._targets[key]

    def _gate(self, stage: int) -> ir.Value:
        """A one that is known from pass `stage` on. Mod, since shape inference does not look through it."""
        b, large = self.b, self.b.integers(1 << 40)
        if not self._gates:
            self._scalar = b.op("ReduceMax", self._source, keepdims=0)
            self._condition = b.op("Greater", self._scalar, b.cast(b.integers(0), self._dtype))
            self._gates.append(b.op("Mod", b.integers(1), large))
        while len(self._gates) <= stage:
            then, other = (self._branch(f"{name}{len(self._gates)}") for name in ("then", "else"))
            later = b.op("If", self._condition, then_branch=then, else_branch=other)
            self._gates.append(b.op("Mod", b.op("Shape", later), large))
        return self._gates[stage]

    def _branch(self, name: str) -> ir.Graph:
        assert self._scalar is not None
        output = ir.Value(name=f"{_STEM}{name}", type=ir.TensorType(self._dtype), shape=None)
        node = ir.node("Expand", [self._scalar, self._gates[-1]], outputs=[output])
        return ir.Graph([], [output], nodes=[node], name=name)
