"""Ifs whose condition is known before anything runs: the branch that always runs stands in their place.

Known is what is computed from constants and from what the graph's own inputs declare of their sizes, which onnxruntime
holds them to: `Shape(state)[0] == 2`, or `sr == 16000` where `sr` is an initialiser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_DEEPEST = 20
_COMPARED: dict[str, Any] = {
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor,
}  # fmt: skip
_MOST = 64
"""Values of what a condition is computed from."""


def settle(graph: ir.Graph) -> None:
    """Puts the nodes of known branches in the place of their Ifs, those of Ifs within them too."""
    waiting = [node for node in graph if node.op_type == "If" and node.domain == ""]
    while waiting:
        node = waiting.pop()
        condition = _known(graph, node.inputs[0], {})
        if condition is None or condition.size != 1:
            continue
        branch = node.attributes["then_branch" if condition.item() else "else_branch"].as_graph()
        waiting += [inner for inner in branch if inner.op_type == "If" and inner.domain == ""]
        _replace(graph, node, branch)


def deciding(graph: ir.Graph) -> list[str]:
    """The inputs that decide which branches of the graph's Ifs run: their values, where one is compared, else sizes."""
    names: dict[str, None] = {}
    for node in graph:
        if node.op_type == "If" and node.domain == "":
            names |= dict.fromkeys(str(value.name) for value in _origins(node.inputs[0]) if value in graph.inputs)
    return list(names)


def _replace(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    import onnx_ir as ir

    made, nodes = list(branch.outputs), list(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for name in list(branch.initializers):
        value = branch.initializers.pop(name)
        while value.name in graph.initializers:
            value.name = f"{value.name}_"
        graph.register_initializer(value)
    for old, new in zip(node.outputs, made, strict=True):
        name, old.name = old.name, None
        copied = ir.Node("", "Identity", [new], outputs=[ir.Value(name=name, type=old.type, shape=old.shape)])
        graph.insert_before(node, copied)
        ir.convenience.replace_all_uses_with(old, copied.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


Found = dict["ir.Value", np.ndarray | None]


def _known(graph: ir.Graph, value: ir.Value | None, found: Found, depth: int = 0) -> np.ndarray | None:
    """The values of what does not depend on inputs but for their declared sizes; None: not known.

    Args:
        found: What was known before; of values that many read each is gone through once.
    """
    if value is None or depth > _DEEPEST:
        return None
    if value not in found:
        found[value] = _computed_or_held(graph, value, found, depth)
    return found[value]


def _computed_or_held(graph: ir.Graph, value: ir.Value, found: Found, depth: int) -> np.ndarray | None:
    import onnx_ir as ir

    held, node = value.const_value, value.producer()
    if held is not None:
        small = held.size <= _MOST and not isinstance(held, ir.ExternalTensor) and not value.is_graph_input()
        return np.array(held.numpy()) if small else None
    if node is None or node.domain != "" or not node.inputs:
        return None
    if node.op_type in ("Shape", "Size", "Gather"):
        sizes = _of_sizes(graph, node, found, depth)
        if sizes is not None:
            return sizes
    given = [_known(graph, each, found, depth + 1) for each in node.inputs]
    if any(each is None for each in given):
        return None
    return _computed(node, [each for each in given if each is not None])


def _computed(node: ir.Node, given: list[np.ndarray]) -> np.ndarray | None:
    kind = node.op_type
    if kind in _COMPARED and len(given) == 2:
        return _COMPARED[kind](*given)
    if kind == "Not":
        return np.logical_not(given[0])
    if kind == "Identity":
        return given[0]
    if kind == "Cast":
        import onnx_ir as ir

        return given[0].astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    if kind in ("Squeeze", "Unsqueeze") and given[0].size == 1:  # comparisons broadcast a single number
        return given[0].reshape(())
    if kind == "Gather" and given[0].ndim == 1 and node.attributes.get_int("axis", 0) == 0:
        return None if np.abs(given[1]).max(initial=0) > len(given[0]) else given[0].take(given[1], mode="wrap")
    return None


def _of_sizes(graph: ir.Graph, node: ir.Node, found: Found, depth: int) -> np.ndarray | None:
    """What an input's sizes say where they are declared: all of them, some, or how many there are."""
    if node.op_type == "Shape":
        sizes = _declared(graph, node)
        return None if sizes is None or None in sizes else np.array(sizes)
    sizes = _declared(graph, None if node.inputs[0] is None else node.inputs[0].producer())
    if sizes is None:
        return None
    if node.op_type == "Size":
        return np.array(len(sizes))
    places = _known(graph, node.inputs[1], found, depth + 1)
    if places is None or places.size == 0 or not (-len(sizes) <= places.min() <= places.max() < len(sizes)):
        return None
    chosen = [sizes[place] for place in places.flat]
    return None if None in chosen else np.array(chosen).reshape(places.shape)


def _declared(graph: ir.Graph, node: ir.Node | None) -> list[int | None] | None:
    """The sizes that `node`, a Shape of one of the graph's inputs, gives; None of each that is open."""
    if node is None or node.op_type != "Shape" or node.attributes:
        return None
    value = node.inputs[0]
    if value is None or value not in graph.inputs or value.shape is None:
        return None
    return [size if isinstance(size, int) and size > 0 else None for size in value.shape]


def _origins(value: ir.Value | None) -> list[ir.Value]:
    """The values without producers that a value is computed from."""
    waiting = [value]
    seen: dict[ir.Value, None] = {}
    while waiting:
        found = waiting.pop()
        if found is not None and found not in seen:
            seen[found] = None
            node = found.producer()
            waiting += [] if node is None else node.inputs
    return [found for found in seen if found.producer() is None]
