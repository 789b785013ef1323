"""Which nodes of a traced network compute on int8 activations: convolutions, and what merely joins their outputs.

By kind, as measured on MobileNetV2 (docs/runtime.md):

    a convolution of many channels               always
    a depthwise or grouped one                   where its input is int8 already: alone it costs more than it saves
    the first one, of up to 4 channels           never: it is slower so, and the most sensitive
    Add, Concat                                  where all inputs are int8
    MaxPool                                      where its input is: it keeps the numbers as they are

Everything else computes on floats. A batch norm after a convolution is folded into it, and a Relu or Clip into the
rounding of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from compressor.export.forms import int8_refusal

IMAGE_CHANNELS = 4


@dataclass(frozen=True)
class Int8Operation:
    """A node that reads and writes int8.

    inputs     the activations that it reads
    norm       the batch norm that is folded into it
    absorbed   what follows and is replaced with it, the norm among them
    output     what the last of them writes
    """

    kind: Literal["conv", "join", "move"]
    node: ir.Node
    inputs: tuple[ir.Value, ...]
    output: ir.Value
    absorbed: tuple[ir.Node, ...] = ()
    norm: ir.Node | None = None


def int8_operations(graph: ir.Graph, describe: Callable[[ir.Value], dict[str, Any] | None]) -> list[Int8Operation]:
    """The operations in order; `describe` gives the description of the tensor that a value stands for, if any."""
    outputs = set(graph.outputs)
    int8: set[ir.Value] = set()
    found: list[Int8Operation] = []
    for node in graph:
        operation = _operation(node, int8, outputs, describe)
        if operation is not None:
            int8.add(operation.output)
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
    node: ir.Node, int8: set[ir.Value], outputs: set[ir.Value], describe: Callable[[ir.Value], dict[str, Any] | None]
) -> Int8Operation | None:
    inputs = [value for value in node.inputs if value is not None]
    if node.domain != "" or not inputs:
        return None
    if node.op_type == "Conv":
        if not is_int8(describe(inputs[1])) or not _pays(node, inputs[0] in int8, describe(inputs[1])):
            return None
        norm = _norm_after(node, outputs, describe)
        return _followed("conv", node, (inputs[0],), outputs, norm)
    if node.op_type in ("Add", "Concat") and len(inputs) > 1 and all(value in int8 for value in inputs):
        return _followed("join", node, tuple(inputs), outputs, None)
    if node.op_type == "MaxPool" and len(node.outputs) == 1 and inputs[0] in int8:
        return Int8Operation("move", node, (inputs[0],), node.outputs[0])
    return None


def _pays(conv: ir.Node, int8_input: bool, description: dict[str, Any] | None) -> bool:
    assert description is not None
    if conv.attributes.get_int("group", 1) > 1:
        return int8_input
    return description["tensor_shape"][1] > IMAGE_CHANNELS


def _only_reader(value: ir.Value, outputs: set[ir.Value]) -> ir.Node | None:
    """The node that alone uses the value, as its first input."""
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0][1] == 0 and value not in outputs
    return uses[0][0] if alone else None


def _norm_after(
    conv: ir.Node, outputs: set[ir.Value], describe: Callable[[ir.Value], dict[str, Any] | None]
) -> ir.Node | None:
    norm = _only_reader(conv.outputs[0], outputs)
    if norm is None or norm.op_type != "BatchNormalization":
        return None
    known = all(value is not None and describe(value) is not None for value in norm.inputs[1:5])
    return norm if known else None


def _followed(
    kind: Literal["conv", "join"], node: ir.Node, inputs: tuple[ir.Value, ...], outputs: set[ir.Value],
    norm: ir.Node | None,
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
    bounds = [clip.inputs[i] if len(clip.inputs) > i else None for i in (1, 2)]
    held = [None if bound is None else bound.const_value for bound in bounds]
    if any(bound is not None and value is None for bound, value in zip(bounds, held, strict=True)):
        return False
    low, high = (None if value is None else float(value.numpy()) for value in held)
    return (low is None or low <= 0) and (high is None or high >= 0)
