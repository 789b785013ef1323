"""Which nodes of a graph may compute on int8 activations: what onnxruntime has integer kernels for.

    conv     a convolution whose weights are stored as int8, but the first one, of up to 4 channels: it gains nothing
             so, and is the most sensitive
    join     Add, Mul, Concat of activations
    map      Sigmoid, GlobalAveragePool: another range comes out
    swish    x · clip(αx + β, 0, 1), as HardSwish or written out: a sum that saturates, and a product
    move     MaxPool, nearest Resize: the numbers stay as they are

Everything else computes on floats. A batch norm after a convolution is folded into it, and a Relu or Clip into the
rounding of the output. Which of the candidates do compute on int8 is for `int8_regions` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from compressor.export.builder import scalar
from compressor.export.forms import int8_refusal

IMAGE_CHANNELS = 4
Kind = Literal["conv", "join", "map", "swish", "move"]
Describe = Callable[[ir.Value], "dict[str, Any] | None"]
IsFloat = Callable[[ir.Value], bool]


@dataclass(frozen=True, eq=False)
class Int8Operation:
    """A node that may read and write int8.

    inputs     the activations that it reads
    norm       the batch norm that is folded into it
    absorbed   what follows and is replaced with it, the norm among them
    output     what the last of them writes
    slope      α of a swish, and `offset` its β
    """

    kind: Kind
    node: ir.Node
    inputs: tuple[ir.Value, ...]
    output: ir.Value
    absorbed: tuple[ir.Node, ...] = ()
    norm: ir.Node | None = None
    slope: float = 0.0
    offset: float = 0.0

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All that it replaces."""
        return (self.node, *self.absorbed)


def int8_operations(graph: ir.Graph, describe: Describe, is_float: IsFloat) -> list[Int8Operation]:
    """The candidates in order.

    Args:
        describe: Gives the description of the tensor that a value stands for, if any.
        is_float: Whether a value is known to be float32.
    """
    outputs = set(graph.outputs)
    taken: set[ir.Node] = set()
    found: list[Int8Operation] = []
    for node in graph:
        operation = None if node in taken else _operation(node, outputs, describe, is_float)
        if operation is not None:
            taken.update(operation.nodes)
            found.append(operation)
    return found


def observed(operations: Iterable[Int8Operation]) -> list[ir.Value]:
    """The values whose range has to be known, each once: what is read and what is written."""
    values: dict[ir.Value, None] = {}
    moved: set[ir.Value] = set()
    for operation in operations:
        values |= dict.fromkeys(value for value in operation.inputs if value not in moved)
        if operation.kind == "move":
            moved.add(operation.output)
        else:
            values[operation.output] = None
    return list(values)


def is_int8(description: dict[str, Any] | None) -> bool:
    """Whether a tensor is stored in whole numbers of one scale per output: eight bits, or signs."""
    return description is not None and int8_refusal(description) is None


def _operation(
    node: ir.Node, outputs: set[ir.Value], describe: Describe, is_float: IsFloat
) -> Int8Operation | None:  # fmt: skip
    inputs = [value for value in node.inputs if value is not None]
    if node.domain not in ("", "ai.onnx") or not inputs or len(node.outputs) != 1:
        return None
    if node.op_type == "Conv":
        description = describe(inputs[1])
        if not is_int8(description) or description is None or not _is_wide(node, description):
            return None
        return _followed("conv", node, (inputs[0],), outputs, _norm_after(node, outputs, describe))
    if not is_float(inputs[0]) or not is_float(node.outputs[0]):
        return None
    return _swish(node, outputs) or _activation(node, inputs, outputs, describe)


def _activation(
    node: ir.Node, inputs: list[ir.Value], outputs: set[ir.Value], describe: Describe
) -> Int8Operation | None:  # fmt: skip
    if node.op_type in ("Add", "Mul", "Concat") and len(inputs) > 1:
        flow = all(value.const_value is None and describe(value) is None for value in inputs)
        return _followed("join", node, tuple(inputs), outputs, None) if flow and len(set(inputs)) > 1 else None
    if node.op_type in ("Sigmoid", "GlobalAveragePool"):
        return Int8Operation("map", node, (inputs[0],), node.outputs[0])
    if node.op_type == "MaxPool" or (node.op_type == "Resize" and _is_nearest(node)):
        return Int8Operation("move", node, (inputs[0],), node.outputs[0])
    return None


def _is_wide(conv: ir.Node, description: dict[str, Any]) -> bool:
    return conv.attributes.get_int("group", 1) > 1 or description["tensor_shape"][1] > IMAGE_CHANNELS


def _is_nearest(resize: ir.Node) -> bool:
    """Whether it repeats values, by constant factors of its own."""
    rest = [value for value in resize.inputs[1:] if value is not None]
    return resize.attributes.get_string("mode", "nearest") == "nearest" and all(
        value.const_value is not None for value in rest
    )


def _only_reader(value: ir.Value, outputs: set[ir.Value]) -> ir.Node | None:
    """The node that alone uses the value, as its first input."""
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0][1] == 0 and value not in outputs
    return uses[0][0] if alone else None


def _norm_after(conv: ir.Node, outputs: set[ir.Value], describe: Describe) -> ir.Node | None:
    norm = _only_reader(conv.outputs[0], outputs)
    if norm is None or norm.op_type != "BatchNormalization" or norm.attributes.get_int("training_mode", 0):
        return None
    known = all(
        value is not None and (value.const_value is not None or describe(value) is not None)
        for value in norm.inputs[1:5]
    )
    return norm if known else None


def _followed(
    kind: Kind, node: ir.Node, inputs: tuple[ir.Value, ...], outputs: set[ir.Value], norm: ir.Node | None
) -> Int8Operation:  # fmt: skip
    absorbed = [norm] if norm is not None else []
    output = absorbed[-1].outputs[0] if absorbed else node.outputs[0]
    after = _only_reader(output, outputs)
    if after is not None and (after.op_type == "Relu" or (after.op_type == "Clip" and _holds_zero(after))):
        absorbed.append(after)
        output = after.outputs[0]
    return Int8Operation(kind, node, inputs, output, tuple(absorbed), norm)


def _holds_zero(clip: ir.Node) -> bool:
    """Whether 0 lies within constant bounds: then rounding to the observed range clips as well."""
    low, high = (_constant(clip, i) for i in (1, 2))
    given = [clip.inputs[i] if len(clip.inputs) > i else None for i in (1, 2)]
    if any(value is not None and bound is None for value, bound in zip(given, (low, high), strict=True)):
        return False
    return (low is None or low <= 0) and (high is None or high >= 0)


def _constant(node: ir.Node, at: int) -> float | None:
    """The number that an input is, if it is a constant of one element."""
    return scalar(node.inputs[at]) if len(node.inputs) > at else None


def _swish(node: ir.Node, outputs: set[ir.Value]) -> Int8Operation | None:
    """x · clip(αx + β, 0, 1), from its first node on."""
    x = node.inputs[0]
    if x is None:
        return None
    if node.op_type == "HardSwish":
        return Int8Operation("swish", node, (x,), node.outputs[0], slope=1 / 6, offset=0.5)
    if node.op_type == "HardSigmoid":
        slope, offset = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        gate = node.outputs[0]
        product = _product_with(gate, x, outputs)
        if product is None or slope <= 0 or offset <= 0:
            return None
        return Int8Operation("swish", node, (x,), product.outputs[0], (product,), None, slope, offset)
    return _written_out(node, x, outputs) if node.op_type == "Add" else None


def _written_out(add: ir.Node, x: ir.Value, outputs: set[ir.Value]) -> Int8Operation | None:
    """x · clip(x + b, 0, h) / h, divided before or after the product."""
    b = _constant(add, 1)
    clip = _only_reader(add.outputs[0], outputs)
    if b is None or b <= 0 or clip is None or clip.op_type != "Clip" or _constant(clip, 1) != 0:
        return None
    h = _constant(clip, 2)
    after = _reader(clip.outputs[0], outputs)
    if h is None or h <= 0 or after is None:
        return None
    if after.op_type == "Mul" and _reads_both(after, clip.outputs[0], x):
        last = _only_reader(after.outputs[0], outputs)
        nodes = (after, last) if last is not None and _divides(last, h) else None
    else:
        last = _product_with(after.outputs[0], x, outputs) if _divides(after, h) else None
        nodes = (after, last) if last is not None else None
    if nodes is None or nodes[-1] is None:
        return None
    return Int8Operation("swish", add, (x,), nodes[-1].outputs[0], (clip, *nodes), None, 1 / h, b / h)


def _reader(value: ir.Value, outputs: set[ir.Value]) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and value not in outputs else None


def _product_with(value: ir.Value, x: ir.Value, outputs: set[ir.Value]) -> ir.Node | None:
    """The only reader of `value`, where it multiplies it with x."""
    node = _reader(value, outputs)
    return node if node is not None and node.op_type == "Mul" and _reads_both(node, value, x) else None


def _reads_both(node: ir.Node, first: ir.Value, second: ir.Value) -> bool:
    return set(node.inputs) == {first, second}


def _divides(node: ir.Node, by: float) -> bool:
    found = _constant(node, 1)
    if found is None:
        return False
    quotient = found if node.op_type == "Div" else 1 / found if node.op_type == "Mul" and found else None
    return quotient is not None and abs(quotient - by) <= 1e-4 * by
