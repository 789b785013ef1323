"""Encoded tensors put in the place of a traced graph's weights, consumer by consumer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from compressor.core.errors import ExportError
from compressor.export.lowering import Lowering, refusal


@dataclass(frozen=True)
class _Product:
    """A node that multiplies something with a weight matrix (inputs, outputs), or (outputs, inputs) if `transpose`.

    What it multiplies and adds is asked of the node when it is its turn: it may be the output of a product before it,
    which is another value by then.
    """

    node: ir.Node
    transpose: bool

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        return self.node.inputs[2] if self.node.op_type == "Gemm" and len(self.node.inputs) > 2 else None


class Substitution:
    """Lowers the consumers of weights in `graph`; what it does not know gets the decoded tensor."""

    def __init__(self, graph: ir.Graph, lowering: Lowering) -> None:
        self.graph, self.lowering = graph, lowering
        self._constants: dict[str, ir.Value] = {}

    def substitute(self, weights: Sequence[ir.Value]) -> None:
        """Replaces every use of the values, which are inputs of the graph and stand for the tensor that their metadata
        name, and removes the inputs.

        Raises:
            ExportError: A consumer cannot be given the encoding of its tensor.
        """
        in_products = {
            _tensor(value) for value in weights if any(self._can_multiply(value, p) for p in _products(value))
        }
        for value in weights:
            for product in list(_products(value)):
                if self._can_multiply(value, product):
                    self._multiply(value, product)
            for node in list(_gathers(value)):
                if self._can_embed(value):
                    self._embed(value, node, _tensor(value) in in_products)
        for value in weights:
            if value.uses():
                value.replace_all_uses_with(self._constant(value), replace_graph_outputs=True)
            self.graph.inputs.remove(value)

    def _description(self, value: ir.Value) -> dict:
        return self.lowering.tensors.describe(_tensor(value))

    def _is_matrix(self, value: ir.Value) -> bool:
        return len(self._description(value)["tensor_shape"]) == 2 and _is_float(value)

    def _can_multiply(self, value: ir.Value, product: _Product) -> bool:
        in_graph = product.node.graph is self.graph
        return (
            in_graph and self._is_matrix(value) and not refusal(self._description(value), "matmul", self.lowering.mode)
        )

    def _can_embed(self, value: ir.Value) -> bool:
        description = self._description(value)
        fits = self._is_matrix(value) and not description["transposed"]
        return fits and not refusal(description, "embedding", self.lowering.mode)

    def _multiply(self, value: ir.Value, product: _Product) -> None:
        self.lowering.builder.before = product.node
        found = self.lowering.matmul(product.x, _tensor(value), product.bias, transpose=product.transpose)
        _replace(product.node, found)

    def _embed(self, value: ir.Value, node: ir.Node, tied: bool) -> None:
        self.lowering.builder.before = node
        ids = node.inputs[1]
        assert ids is not None
        _replace(node, self.lowering.embedding(ids, _tensor(value), tied=tied))

    def _constant(self, value: ir.Value) -> ir.Value:
        """The decoded tensor: nodes that fold at load, one chain per tensor."""
        name, lowering = _tensor(value), self.lowering
        if name not in self._constants:
            if not _is_float(value):
                self._constants[name] = self._integers(name)
                return self._constants[name]
            reason = refusal(lowering.tensors.describe(name), "constant", lowering.mode)
            if reason:
                raise ExportError(f"{name}: {reason}")
            lowering.builder.before = self.graph[0]
            self._constants[name] = lowering.constant(name)
        return self._constants[name]

    def _integers(self, name: str) -> ir.Value:
        tensor = self.lowering.tensors[name]
        values = tensor.layout.tensor(tensor.encoding.parts()["weight"])
        return self.lowering.builder.initializer(ir.Tensor(values.numpy(), name=name))


def _tensor(value: ir.Value) -> str:
    return value.metadata_props["tensor"]


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _products(value: ir.Value) -> Iterator[_Product]:
    """The products of inputs with a matrix: MatMul(x, W), MatMul(x, Wᵀ), Gemm."""
    yield from _products_with(value, False)
    for node, index in value.uses():
        if node.op_type == "Transpose" and index == 0 and list(node.attributes.get_ints("perm", (1, 0))) == [1, 0]:
            yield from _products_with(node.outputs[0], True)


def _products_with(value: ir.Value, transposed: bool) -> Iterator[_Product]:
    for node, index in value.uses():
        x = node.inputs[0]
        if index != 1 or x is None or x is value:
            continue
        if node.op_type == "MatMul" and node.domain == "":
            yield _Product(node, transposed)
        elif node.op_type == "Gemm" and _is_plain(node):
            yield _Product(node, transposed != bool(node.attributes.get_int("transB", 0)))


def _is_plain(gemm: ir.Node) -> bool:
    scales = (gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return not gemm.attributes.get_int("transA", 0) and all(scale == 1.0 for scale in scales)


def _gathers(value: ir.Value) -> Iterator[ir.Node]:
    """Look-ups of rows."""
    for node, index in value.uses():
        if node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0:
            yield node


def _replace(node: ir.Node, found: ir.Value) -> None:
    old = node.outputs[0]
    found.shape, found.type = old.shape, old.type
    old.replace_all_uses_with(found, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
