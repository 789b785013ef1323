"""The graph of a network's channels, read off its trace: convolutions, batch norms, residual sums, a linear head.

What works on each channel by itself, as activations and pools, is passed through. Anything that a graph of kernels
between layers cannot say is refused by its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from compressor.core.channels import ChannelGraph, ChannelLayer, ChannelNorm, Kernels
from compressor.core.errors import CheckpointError
from compressor.graph.operator_kinds import POINTWISE, POOLS
from compressor.graph.tracing import Example, Trace, operator_name, trace

_UNARY = POINTWISE | POOLS | frozenset((
    "relu", "relu_", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardtanh_", "hardswish_",
    "hardsigmoid", "mish", "softplus", "alias", "detach", "leaky_relu_", "silu_", "selu", "celu",
))  # fmt: skip
_SHAPES = frozenset(("mean", "view", "reshape", "flatten", "squeeze", "_unsafe_view", "amax"))
_NONE = -1
"""The target of kernels before there is a layer."""
_NORMS = frozenset(("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"))


@dataclass
class _Term:
    """Channels before they are a layer: kernels that add up, and what is done to their sum."""

    size: int
    kernels: list[Kernels]  # their target is not known yet
    norm: ChannelNorm | None = None
    other: ChannelNorm | None = None
    bias: str = ""
    other_bias: str = ""

    @property
    def source(self) -> int:
        """The latest layer that it reads."""
        return max(kernels.source for kernels in self.kernels)


def channel_graph(module: nn.Module, example: Example) -> ChannelGraph:
    """The graph of a module's channels.

    Args:
        example: Arguments of its forward, by position or by name; they are traced, not learned from.

    Raises:
        CheckpointError: The forward cannot be traced, or does what the graph cannot say.
    """
    return _Walk(type(module).__name__, trace(module, example)).run()


class _Walk:
    """Through the nodes of a trace in order.

    found    node -> the number of its layer, or a term that is none yet
    places   node -> (height, width) of each channel, where it is flattened
    """

    def __init__(self, title: str, traced: Trace) -> None:
        self.title, self.traced = title, traced
        self.layers: list[ChannelLayer] = []
        self.kernels: list[Kernels] = []
        self.found: dict[fx.Node, int | _Term] = {}
        self.places: dict[fx.Node, tuple[int, int]] = {}

    def run(self) -> ChannelGraph:
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._function(node)
            elif node.op == "output":
                given = [each for each in node.all_input_nodes if each in self.found]
                if len(given) != 1:
                    raise self._refusal(f"it gives {len(given)} outputs that depend on its input")
                last = self._layer(given[0])
                if last != len(self.layers) - 1:
                    raise self._refusal("its output is not what it computes last")
        weights = [kernels.weight for kernels in self.kernels if kernels.weight]
        if not weights:
            raise self._refusal("it has no convolution and no linear layer")
        twice = next((name for name in weights if weights.count(name) > 1), None)
        if twice:
            raise self._refusal(f"'{twice}' is used twice")
        return ChannelGraph(tuple(self.layers), tuple(self.kernels))

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.traced.tensors or node.name in self.traced.constants:
            return
        shape = _shape(node)
        if len(shape) != 4 or self.layers:
            what = "several inputs" if self.layers else f"an input of {len(shape)} dimensions"
            raise self._refusal(f"it has {what}, where one of images (n, channels, height, width) is read")
        self.layers.append(ChannelLayer(shape[1]))
        self.found[node] = 0

    def _function(self, node: fx.Node) -> None:
        given = [each for each in node.all_input_nodes if each in self.found]
        if not given:
            return  # of parameters and constants alone
        name = operator_name(node)
        if name in ("conv2d", "linear"):
            self.found[node] = self._product(node, name)
        elif name in _NORMS:
            self.found[node] = self._normed(node)
        elif name == "getitem":
            self.found[node] = self.found[given[0]]
        elif name in ("add", "add_") and len(given) == 2 and len(node.all_input_nodes) == 2:
            self.found[node] = self._sum(node)
        elif name in _UNARY and len(node.all_input_nodes) == 1:
            self.found[node] = self._layer(given[0])
            if given[0] in self.places:
                self.places[node] = self.places[given[0]]
        elif name in _SHAPES and len(node.all_input_nodes) == 1 and self._keeps_channels(node, given[0]):
            self.found[node] = self._layer(given[0])
        else:
            raise self._refusal(f"'{node.name}' computes {name}, which is no layer of kernels")

    def _keeps_channels(self, node: fx.Node, given: fx.Node) -> bool:
        """Whether what a change of shape leaves has a channel at each place of its second axis, or those one after the
        other."""
        before, after = _shape(given), _shape(node)
        if len(before) == 4 and after == (before[0], math.prod(before[1:])):
            self.places[node] = before[2], before[3]
            return True
        if given in self.places or len(after) < 2 or after[:2] != before[:2]:
            return False
        return operator_name(node) in ("mean", "amax") or math.prod(before) == math.prod(after)

    def _product(self, node: fx.Node, name: str) -> _Term:
        """Of a convolution (x, weight, bias, stride, padding, dilation, groups) or linear (x, weight, bias)."""
        x, weight, *rest = node.args
        bias = rest[0] if rest else node.kwargs.get("bias")
        tensor = self._tensor(weight)
        if not isinstance(x, fx.Node) or tensor is None or (isinstance(bias, fx.Node) and self._tensor(bias) is None):
            raise self._refusal(f"'{node.name}' multiplies by what is no parameter of its own")
        assert isinstance(weight, fx.Node)
        shape = _shape(weight)
        source = self._layer(x)
        window = (shape[2], shape[3]) if len(shape) == 4 else self.places.get(x, (1, 1))
        groups = int(node.args[6]) if len(node.args) > 6 else 1  # pyright: ignore[reportArgumentType]
        read = shape[1] * groups if len(shape) == 4 else shape[1] // math.prod(window)
        if (name == "linear" and len(_shape(x)) != 2) or read != self.layers[source].size:
            raise self._refusal(f"'{tensor}' reads {read:,} of {self.layers[source].size:,} channels")
        return _Term(shape[0], [Kernels(tensor, source, _NONE, window, groups)], bias=self._tensor(bias) or "")

    def _normed(self, node: fx.Node) -> _Term:
        x, weight, bias, mean, variance = node.args[:5]
        term = self.found[x] if isinstance(x, fx.Node) else 0
        if not isinstance(term, _Term) or term.norm is not None or len(term.kernels) > 1:
            raise self._refusal(f"'{node.name}' is a batch norm that does not follow a convolution right away")
        norm = ChannelNorm(*(self._tensor(each) or "" for each in (weight, bias, mean, variance)))
        return replace(term, norm=norm, bias="")

    def _sum(self, node: fx.Node) -> int:
        """A layer of its own; of two ways the main one is that which reads the later layer, of equal ones the first."""
        first, second = (self.found[each] for each in node.args[:2] if isinstance(each, fx.Node))
        shapes = {_shape(each) for each in node.args[:2] if isinstance(each, fx.Node)}
        if len(shapes) > 1 or node.kwargs.get("alpha", 1) != 1:
            raise self._refusal(f"'{node.name}' adds what is of two shapes, or scaled")
        terms = [each for each in (first, second) if isinstance(each, _Term)]
        terms.sort(key=lambda term: -term.source)
        kernels = [each for term in terms for each in term.kernels]
        kernels += [Kernels("", each, _NONE) for each in (first, second) if isinstance(each, int)]
        nothing = _Term(0, [])
        main, other = (*terms, nothing, nothing)[:2]
        return self._made(_Term(self._size(first), kernels, main.norm, other.norm, main.bias, other.bias))

    def _size(self, found: int | _Term) -> int:
        return self.layers[found].size if isinstance(found, int) else found.size

    def _layer(self, node: fx.Node) -> int:
        """The number of the layer that a node has the channels of; a term becomes one where it is first read."""
        found = self.found[node]
        if isinstance(found, _Term):
            number = self._made(found)
            for each, other in self.found.items():
                if other is found:
                    self.found[each] = number
            return number
        return found

    def _made(self, term: _Term) -> int:
        number = len(self.layers)
        self.layers.append(ChannelLayer(term.size, term.norm, term.other, term.bias, term.other_bias))
        self.kernels += [replace(kernels, target=number) for kernels in term.kernels]
        return number

    def _tensor(self, node: object) -> str | None:
        return self.traced.tensors.get(node.name) if isinstance(node, fx.Node) else None

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.title}: its channels are no graph of kernels: {what}; networks of convolutions with batch norms, "
            "residual sums and a linear head are"
        )


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()
