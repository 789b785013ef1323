"""A thin hand for writing ONNX nodes: operators, constants stored once, and initialisers that lie in another file."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIBUTED = "com.microsoft"


class GraphBuilder:
    """Adds nodes to `graph`: at its end, or before the node `before` (settable) when a graph is rewritten.

    Equal constants become one initialiser. When nodes were added out of order, call `graph.sort()` at the end. `stem`
    begins the names that it makes up.
    """

    def __init__(self, graph: ir.Graph, before: ir.Node | None = None, stem: str = "") -> None:
        self.graph, self.before, self.stem = graph, before, stem
        self._constants: dict[tuple, ir.Value] = {}
        self._external: dict[str, ir.Value] = {}
        self._made: dict[Hashable, ir.Value] = {}
        self._n_values = 0

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", name: str | None = None, **attributes: Any
    ) -> ir.Value:
        """The first output of a new node."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """All outputs of a new node; the values are called `name`, `name.1`, …"""
        self._n_values += 1
        stem = name or f"{self.stem}{op_type}_{self._n_values}"
        values = [ir.Value(name=stem if i == 0 else f"{stem}.{i}") for i in range(outputs)]
        node = ir.node(op_type, list(inputs), attributes, domain=domain, outputs=values, name=f"node_{stem}")
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return values

    def contributed(self, op_type: str, *inputs: ir.Value | None, name: str | None = None, **attributes: Any):
        """The first output of a node of onnxruntime's own domain."""
        return self.op(op_type, *inputs, domain=CONTRIBUTED, name=name, **attributes)

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(to))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", value, self.integers(*shape))

    def integers(self, *values: int) -> ir.Value:
        """A constant int64 vector: a shape, axes."""
        return self.constant(np.array(values, np.int64))

    def slice(self, value: ir.Value, stop: int, axis: int) -> ir.Value:
        """The first `stop` of `axis`."""
        return self.op("Slice", value, self.integers(0), self.integers(stop), self.integers(axis))

    def constant(self, array: np.ndarray | float) -> ir.Value:
        """An initialiser held in the graph; a bare number is a float32 scalar."""
        values = np.ascontiguousarray(array if isinstance(array, np.ndarray) else np.float32(array))
        if np.ndim(array) == 0:
            values = values.reshape(())
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            name = f"{self.stem}constant_{len(self._constants)}"
            self._constants[key] = self.initializer(ir.Tensor(values, name=name))
        return self._constants[key]

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` makes at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def external(
        self, name: str, location: str, offset: int, length: int, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """An initialiser that is `length` bytes of the file `location`, relative to the model, or the known one."""
        if name not in self._external:
            if name in self.graph.initializers:
                return self.graph.initializers[name]
            tensor = ir.ExternalTensor(location, offset, length, dtype, shape=ir.Shape(shape), name=name)
            self._external[name] = self.initializer(tensor)
        return self._external[name]

    def stacked(self, values: Sequence[ir.Value]) -> ir.Value:
        """Values one after another along their first axis: what lies so in one file is an initialiser of its own."""
        if len(values) == 1:
            return values[0]
        stored = [value.const_value for value in values]
        first = stored[0]
        if not isinstance(first, ir.ExternalTensor) or not _follow_each_other(stored):
            return self.op("Concat", *values, axis=0)
        shapes = [tuple(value.shape.numpy()) for value in stored if value is not None]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        length = sum(value.nbytes for value in stored if value is not None)
        return self.view(values[0], first, first.offset or 0, length, shape)

    def view(
        self, like: ir.Value, stored: ir.ExternalTensor, offset: int, length: int, shape: tuple[int, ...]
    ) -> ir.Value:  # fmt: skip
        """Bytes of the file that another initialiser lies in, named after it as the parts of tensors are."""
        stem = str(like.name).partition("@")[0]
        label = f"{stem}@{offset}:{stored.dtype.name.lower()}{'x'.join(map(str, shape))}"
        return self.external(label, str(stored.location), offset, length, stored.dtype, shape)

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


def forget_types(graph: ir.Graph) -> None:
    """Drops what is noted of the values between a graph's inputs and outputs: tensors and operators say it as well, and
    of a small network it is a twentieth of all bytes."""
    made = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*made, *graph.initializers.values()):
        if not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None


def scalar(value: ir.Value | None) -> float | None:
    """The number that a value is, if it is a constant of one element."""
    held = None if value is None else value.const_value
    return float(held.numpy().item()) if held is not None and held.size == 1 else None


def _follow_each_other(stored: Sequence[ir.TensorProtocol | None]) -> bool:
    """Whether tensors lie in one file, each where the one before ends."""
    at = None
    for each in stored:
        if not isinstance(each, ir.ExternalTensor) or at not in (None, (each.location, each.offset)):
            return False
        at = each.location, (each.offset or 0) + (each.length or 0)
    return True
