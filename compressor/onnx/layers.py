"""Which nodes of an ONNX graph are layers, and what their weights are called. Needs no torch.

    MatMul(x, W), Gemm      a linear layer; W is (inputs, outputs) unless transB, or a Transpose before it, says else
    Conv                    a convolution
    Gather(W, ids, axis=0)  an embedding
    LSTM, GRU, RNN          no layer, but W and R are matrices that are stored as those of torch's are, by their values

W is a float32 initialiser. All other float32 initialisers of some size are tensors as well, which stay dense; small
ones (shapes, bounds, scales that operators may want constant) remain what they are in the graph, as do those that hold
infinities, which are masks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from compressor.checkpoints.source import TensorInfo
from compressor.core.passes import Role

SMALLEST = 64
"""Values of an initialiser that is a tensor of its own."""
GENERATED = re.compile(r"^(onnx::|/|\d|val_|_|const|ortshared|graph_constant|arg\d|[^\w.:/]|.{120})")
"""Names that exporters make up; the node's own says more."""
RESERVED = frozenset(
    [
        "T_destination", "add_module", "apply", "bfloat16", "bias", "buffers", "call_super_init", "children",
        "compile", "cpu", "cuda", "double", "dump_patches", "eval", "extra_repr", "float", "forward", "get_buffer",
        "get_extra_state", "get_parameter", "get_submodule", "half", "ipu", "load_state_dict", "modules", "mtia",
        "named_buffers", "named_children", "named_modules", "named_parameters", "parameters",
        "register_backward_hook", "register_buffer", "register_forward_hook", "register_forward_pre_hook",
        "register_full_backward_hook", "register_full_backward_pre_hook", "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook", "register_module", "register_parameter", "register_state_dict_post_hook",
        "register_state_dict_pre_hook", "requires_grad_", "set_extra_state", "set_submodule", "share_memory",
        "smart_apply", "state_dict", "to", "to_empty", "train", "training", "type", "weight", "xpu", "zero_grad",
    ]
)  # fmt: skip
"""Attributes of torch's modules, one of them by transformers, which no layer may be called."""


RECURRENT = ("LSTM", "GRU", "RNN")
MOVING = ("Reshape", "Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Identity")
"""Operators by which exporters bring a weight into the order that recurrent nodes take."""


@dataclass(frozen=True)
class Layer:
    """A node with a weight of its own.

    path        where the layer stands in a module, as `encoder.layer_0.query`; several nodes may share one
    weight      W; `addend` what is added to its product, if anything, and `bias` whether that is the layer's own
    add         the node that adds it, where that is another
    transposed  W is (inputs, outputs)
    """

    node: ir.Node
    kind: Literal["linear", "conv", "embedding"]
    weight: ir.Value
    path: str
    transposed: bool = False
    addend: ir.Value | None = None
    bias: bool = False
    add: ir.Node | None = None

    @property
    def output(self) -> ir.Value:
        return (self.add or self.node).outputs[0]

    @property
    def x(self) -> ir.Value:
        """What it is given: ids, of an embedding."""
        found = self.node.inputs[1 if self.kind == "embedding" else 0]
        assert found is not None
        return found


@dataclass
class Weights:
    """The layers in order, and every tensor by name: `values` are its initialisers, `recurrent` those of gates."""

    layers: list[Layer] = field(default_factory=list)
    values: dict[str, ir.Value] = field(default_factory=dict)
    recurrent: list[str] = field(default_factory=list)

    def infos(self) -> Iterable[TensorInfo]:
        """What is known of each tensor without reading it."""
        kinds = {f"{layer.path}.weight": layer for layer in reversed(self.layers)}
        for name, value in self.values.items():
            layer = kinds.get(name)
            role: Role = "linear" if name in self.recurrent else layer.kind if layer is not None else "other"
            info = describe_info(name, value, role, layer is not None and layer.transposed)
            yield replace(info, place="recurrent") if name in self.recurrent else info


def values_of(value: ir.Value) -> ir.TensorProtocol:
    """What an initialiser holds."""
    assert value.const_value is not None
    return value.const_value


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """An initialiser's shape."""
    return tuple(values_of(value).shape.numpy())


def describe_info(name: str, value: ir.Value, role: Role, transposed: bool) -> TensorInfo:
    """The entry of a float32 weight in a list of tensors."""
    shape = shape_of(value)
    return TensorInfo(name, shape, "F32", 4 * math.prod(shape), role, transposed)


def find_weights(graph: ir.Graph, is_finite: Callable[[ir.Value], bool]) -> Weights:
    """The layers and tensors of a graph; `is_finite` reads an initialiser."""
    found, names = Weights(), _Names({str(value.name) for value in (*graph.inputs, *graph.outputs)})
    paths: dict[ir.Value, Layer] = {}
    for index, node in enumerate(graph):
        layer = _layer(node, graph)
        if layer is None:
            continue
        known = paths.get(layer.weight)
        path = known.path if known else names.path(_stem(layer, index))
        own = known is None and layer.addend is not None and _is_own_bias(layer)
        if layer.add is not None and not own:
            layer = replace(layer, add=None, addend=None)
        layer = replace(layer, path=path, bias=own)
        if known is None:
            paths[layer.weight] = layer
            found.values[f"{path}.weight"] = layer.weight
            if own and layer.addend is not None:
                found.values[f"{path}.bias"] = layer.addend
        found.layers.append(layer)
    named = set(found.values.values())
    for name, value in graph.initializers.items():
        if value in named or not _is_weight(value, graph) or not value.uses():
            continue
        shape = shape_of(value)
        if math.prod(shape) < SMALLEST or (len(shape) > 1 and not is_finite(value)):
            continue
        leaf = names.leaf(name)
        found.values[leaf] = value
        if len(shape) == 2 and _is_of_gates(value):
            found.recurrent.append(leaf)
    return found


def gates_as_matrices(graph: ir.Graph) -> None:
    """Weights of LSTM, GRU and RNN nodes, (directions, gates, inputs), become matrices that a Reshape gives them: a row
    for each gate, which is how their codes are grouped."""
    for value in list(graph.initializers.values()):
        shape = shape_of(value) if value.const_value is not None else ()
        if len(shape) != 3 or not _is_weight(value, graph) or not all(_reads_gates(*use) for use in value.uses()):
            continue
        if not value.uses():
            continue
        name, matrix = str(value.name), (shape[0] * shape[1], shape[2])
        tensor = _reshaped(values_of(value), matrix)
        made = ir.Value(name=name, shape=ir.Shape(matrix), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
        sizes = ir.Tensor(np.array(shape, np.int64), name=f"{name}.gates_shape")
        given = ir.Value(
            name=sizes.name, shape=ir.Shape((3,)), type=ir.TensorType(ir.DataType.INT64), const_value=sizes
        )
        node = ir.Node("", "Reshape", [made, given], outputs=[ir.Value(name=f"{name}.gates")], name=f"{name}.as_gates")
        value.replace_all_uses_with(node.outputs[0])
        graph.initializers.pop(name)
        graph.register_initializer(made)
        graph.register_initializer(given)
        graph.insert_before(graph[0], node)


def _reshaped(tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """The same numbers in another shape; what lies in another file stays there."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(shape),
            name=str(tensor.name), base_dir=tensor.base_dir,
        )  # fmt: skip
    return ir.Tensor(tensor.numpy().reshape(shape), name=str(tensor.name))


def _reads_gates(node: ir.Node, index: int) -> bool:
    return node.op_type in RECURRENT and node.domain == "" and index in (1, 2)


def _is_of_gates(value: ir.Value) -> bool:
    """Whether all that an initialiser goes to, parted, joined or turned, are the gates of recurrent nodes."""
    open_values, seen = [value], {value}
    while open_values:
        uses = list(open_values.pop().uses())
        if not uses:
            return False
        for node, index in uses:
            if _reads_gates(node, index):
                continue
            if node.op_type not in MOVING or node.domain != "" or node.outputs[0].is_graph_output():
                return False
            open_values += [each for each in node.outputs[:1] if each not in seen]
            seen.update(node.outputs[:1])
    return True


def _layer(node: ir.Node, graph: ir.Graph) -> Layer | None:
    """The node as a layer whose path is not known yet."""
    if node.domain != "" or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    x, w = node.inputs[0], node.inputs[1]
    if node.op_type == "Gather":
        if _is_weight(x, graph, 2) and node.attributes.get_int("axis", 0) == 0 and w is not x:
            return Layer(node, "embedding", x, "")
        return None
    addend = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "Conv":
        known = _is_weight(w, graph, 3, 4, 5) and (addend is None or _is_weight(addend, graph, 1))
        return Layer(node, "conv", w, "", False, addend) if known and x is not w else None
    plain = node.op_type == "MatMul" or (node.op_type == "Gemm" and _is_plain(node))
    flipped = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    before = w.producer()
    if before is not None and before.inputs and before.inputs[0] is not None and _flips(before):
        w, flipped = before.inputs[0], not flipped
    if not plain or not _is_weight(w, graph, 2) or x is w:
        return None
    layer = Layer(node, "linear", w, "", not flipped, addend)
    add = _add_behind(node) if node.op_type == "MatMul" else None
    return layer if add is None else replace(layer, addend=next(v for v in add.inputs if v and v.const_value), add=add)


def _flips(node: ir.Node) -> bool:
    """Whether a node transposes a matrix."""
    return (
        node.op_type == "Transpose" and node.domain == "" and list(node.attributes.get_ints("perm", (1, 0))) == [1, 0]
    )


def _add_behind(node: ir.Node) -> ir.Node | None:
    """The node that alone uses what this one gives, if it adds an initialiser to it."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or uses[0][0].graph is not node.graph:
        return None
    held = [value for value in uses[0][0].inputs if value is not None and value.const_value is not None]
    return uses[0][0] if len(held) == 1 and not node.outputs[0].is_graph_output() else None


def _is_plain(gemm: ir.Node) -> bool:
    scales = (gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return not gemm.attributes.get_int("transA", 0) and all(scale == 1.0 for scale in scales)


def _is_weight(value: ir.Value, graph: ir.Graph, *dimensions: int) -> bool:
    """Whether the value is a float32 initialiser, with so many dimensions, that holds something."""
    tensor = value.const_value
    if tensor is None or value.name is None or graph.initializers.get(value.name) is not value:
        return False
    shape = tensor.shape.numpy()
    fits = not dimensions or len(shape) in dimensions
    return fits and tensor.dtype == ir.DataType.FLOAT and math.prod(shape) > 0 and value not in graph.outputs


def _is_own_bias(layer: Layer) -> bool:
    """Whether what is added is an initialiser of one value per output, and nobody else's."""
    addend, shape = layer.addend, shape_of(layer.weight)
    assert addend is not None and layer.node.graph is not None
    outputs = shape[1] if layer.transposed else shape[0]
    fits = _is_weight(addend, layer.node.graph, 1) and shape_of(addend) == (outputs,)
    return fits and len(list(addend.uses())) == 1


def _stem(layer: Layer, index: int) -> str:
    """What the layer might be called: by its weight, else by its bias, by its node, or by its place."""
    node, own = layer.node, str(layer.weight.name or "")
    if own and not GENERATED.match(own):
        return re.sub(r"[._](weight|kernel|W|w)$", "", own)
    bias = str(layer.addend.name or "") if layer.addend is not None else ""
    if bias and not GENERATED.match(bias) and bias.endswith("bias"):
        return re.sub(r"[._]bias$", "", bias)
    name = str(node.name or "")
    if "/" in name.strip("/"):
        return name.rpartition("/")[0]
    return f"{node.op_type.lower()}_{index}" if not name or name.startswith(("node_", "_")) else name


class _Names:
    """Names of modules and tensors, each once, that torch's modules can have; `taken` are other things' names."""

    def __init__(self, taken: set[str]) -> None:
        self._tensors = taken
        self._paths: set[str] = set()

    def path(self, stem: str) -> str:
        """A layer's place."""
        return self._free(_segments(stem), lambda path: [f"{path}.weight", f"{path}.bias"])

    def leaf(self, name: str) -> str:
        """A tensor's name that is no layer's."""
        parts = _segments(name)
        parts = [*parts[:-1], parts[-1].rstrip("_")] if parts[-1] in ("weight_", "bias_") and len(parts) > 1 else parts
        return self._free(parts, lambda path: [path])

    def _free(self, parts: list[str], tensors: Callable[[str], list[str]]) -> str:
        parts = list(parts)
        for i in range(len(parts) - 1):  # below a tensor there is no place
            while ".".join(parts[: i + 1]) in self._tensors:
                parts[i] += "_"
        for number in range(10_000_000):
            path = ".".join(parts) + (f"_{number}" if number else "")
            made = tensors(path)
            above = {path.rsplit(".", n)[0] for n in range(path.count(".") + 1)}
            if not (self._tensors & {*made, *above} or (made == [path] and path in self._paths)):
                self._tensors.update(made)
                self._paths |= above
                return path
        raise AssertionError("more tensors than names")


def _segments(text: str) -> list[str]:
    """A path's parts: words that attributes may have; numbers go with the word before."""
    parts: list[str] = []
    for word in re.split(r"[./:]+", text[:200]):
        word = re.sub(r"\W", "_", word, flags=re.ASCII)
        if not word:
            continue
        if word.isdigit() and parts:
            parts[-1] = f"{parts[-1]}_{word}"
        else:
            word = f"n{word}" if word[0].isdigit() or word[0] == "_" else word
            parts.append(f"{word}_" if word in RESERVED else word)
    return parts or ["tensor"]
