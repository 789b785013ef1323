"""Inputs of an ONNX graph that data need not hold: a recurrent network's state, and one number that it compares.

A state is what the graph gives back under its own name and more (`state` → `stateN`, `h` → `hn`): before the first
step it is zeros. Of a whole number, such as a sampling rate, the graph says itself which it knows: the one that it is
compared with. Both are arrays without an axis of examples, and so is what a state's examples lie along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.onnx.file import every_graph, used

if TYPE_CHECKING:
    import onnx_ir as ir


def default_inputs(graph: ir.Graph) -> dict[str, np.ndarray]:
    """For one example, by name."""
    found = {}
    for value in graph.inputs:
        array = _state(graph, value) if _is_state(graph, value) else _number(graph, value)
        if array is not None:
            found[str(value.name)] = array
    return found


def is_along_first(graph: ir.Graph, name: str) -> bool:
    """Whether the examples of an input lie along its first axis, as those of the graph's first input do."""
    sizes = {str(value.name): list(value.shape or ()) for value in graph.inputs}
    first, mine = next(iter(sizes.values())), sizes[name]
    return bool(first and mine) and not isinstance(first[0], int) and str(first[0]) == str(mine[0])


def _is_state(graph: ir.Graph, value: ir.Value) -> bool:
    import onnx_ir as ir

    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or not value.shape or value is graph.inputs[0]:
        return False
    name, n_axes = str(value.name), len(value.shape)
    alike = [out for out in graph.outputs if out.shape is not None and len(out.shape) == n_axes]
    return any(str(out.name) != name and str(out.name).startswith(name) for out in alike)


def _state(graph: ir.Graph, value: ir.Value) -> np.ndarray | None:
    """Zeros; axes that are open are of one."""
    sizes: list[Any] = list(value.shape or ())
    if is_along_first(graph, str(value.name)):
        sizes = sizes[1:]
    assert value.dtype is not None
    return np.zeros([size if isinstance(size, int) and size > 0 else 1 for size in sizes], value.dtype.numpy())


def _number(graph: ir.Graph, value: ir.Value) -> np.ndarray | None:
    """The whole number that an input of one is compared with first, 0 where nothing reads it; else None."""
    import onnx_ir as ir

    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or value.shape is None or list(value.shape):
        return None
    assert value.dtype is not None
    kind = value.dtype.numpy()
    if not any(value in used([node]) for node in graph):
        return np.array(0, kind)
    for node in (node for each in every_graph(graph) for node in each if node.op_type == "Equal"):
        others = [other for other in node.inputs if other is not value]
        held = others[0].const_value if value in node.inputs and len(others) == 1 and others[0] is not None else None
        if held is not None and held.size == 1:
            return np.array(held.numpy()).reshape(()).astype(kind)
    return None
