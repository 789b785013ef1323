"""Where the layers of a network stand: which read its input, which give its output, which lie alone on a shortcut.

Read off the traced graph. A layer is a node that multiplies with a weight; what lies between two layers is anything
else. Binarisation leaves such layers dense, as all of its literature does.
"""

from __future__ import annotations

from torch import fx, nn

from compressor.graph.blocks import layers
from compressor.graph.tracing import Example, Trace, operator_name, trace

FIRST = "reads the network's input"
LAST = "gives the network's output"
SHORTCUT = "is the only layer of a shortcut"
UNUSED = "is no layer of its own in the forward"
_RESHAPES = frozenset(
    [
        "view",
        "permute",
        "t",
        "transpose",
        "expand",
        "unsqueeze",
        "squeeze",
        "clone",
        "_unsafe_view",
        "alias",
        "_to_copy",
    ]
)


def layer_places(module: nn.Module, example: Example) -> dict[str, str]:
    """Weight of a layer -> what its place is, "" where it is an ordinary one; in execution order.

    Raises:
        CheckpointError: The network cannot be traced.
    """
    names = layers(module)
    walk = _Walk(trace(module, example), set(names))
    found = {name: walk.place(node) for node, name in walk.layers.items()}
    return found | {name: UNUSED for name in names if name not in found}


class _Walk:
    """The graph of a trace, and its layers in order: node -> name of the weight; of several uses the first."""

    def __init__(self, traced: Trace, names: set[str]) -> None:
        self.traced, self.names = traced, names
        self.weights = {node: name for node in traced.graph.nodes if (name := self._weight(node))}
        self.layers: dict[fx.Node, str] = {}
        for node, name in self.weights.items():
            if name not in self.layers.values():
                self.layers[node] = name
        self.bit = {node: 1 << i for i, node in enumerate(traced.graph.nodes)}
        self.above: dict[fx.Node, int] = {}  # what a node rests on, as bits, and itself
        for node in traced.graph.nodes:  # in order of execution
            self.above[node] = self.bit[node]
            for each in node.all_input_nodes:
                self.above[node] |= self.above[each]
        self.shortcuts = self._shortcuts()

    def place(self, node: fx.Node) -> str:
        """Of a layer."""
        others = [each for each in self.weights if each is not node]
        if not any(self.above[node] & self.bit[each] for each in others):
            return FIRST
        if not any(self.above[each] & self.bit[node] for each in others):
            return LAST
        return SHORTCUT if node in self.shortcuts else ""

    def _weight(self, node: fx.Node) -> str | None:
        """The layer's weight that an operator multiplies or looks up in, if it does."""
        if node.op != "call_function" or operator_name(node) in _RESHAPES:
            return None
        return next((name for each in node.all_input_nodes if (name := self._tensor(each)) in self.names), None)

    def _tensor(self, node: fx.Node) -> str | None:
        """The tensor that a node is, but for its shape."""
        while node.op == "call_function" and operator_name(node) in _RESHAPES:
            node = node.all_input_nodes[0]
        return self.traced.tensors.get(node.name) if node.op == "placeholder" else None

    def _shortcuts(self) -> set[fx.Node]:
        """Of each sum whose two terms come from one place, the layer that is alone on its way beside several."""
        found: set[fx.Node] = set()
        for node in self.traced.graph.nodes:
            if operator_name(node) != "add" or len(node.all_input_nodes) != 2:
                continue
            left, right = node.all_input_nodes
            ways = self._way(left, self.above[right]), self._way(right, self.above[left])
            for way, other in (ways, ways[::-1]):
                if len(way) == 1 and len(other) > 1:
                    found |= set(way)
        return found

    def _way(self, node: fx.Node, until: int) -> list[fx.Node]:
        """The layers from a term back to where both terms come from, along activations."""
        way: list[fx.Node] = []
        while not until & self.bit[node] and node.op == "call_function":
            if node in self.weights:
                way.append(node)
            inputs = [each for each in node.all_input_nodes if self._tensor(each) is None]
            if not inputs:
                break
            node = inputs[0]
        return way
