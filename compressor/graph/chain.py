"""The layers of a convolutional network in the order of a forward, what feeds what, and which layers a shortcut spans.

A residual block is read from the graph: at a sum, what only one of the two sides went through. The longer side is the
block, the other its shortcut; a layer belongs to the shortest block that it is in.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from compressor.core.students import Layer
from compressor.graph.tracing import Example, trace

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_NORMS = ("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm", "native_group_norm", "group_norm")


@dataclass(frozen=True)
class Step:
    """One operator on feature maps or vectors.

    kind      conv, linear, norm, pool, add, cat or other
    module    whose weights it reads, or which it is; empty for an operator that a forward calls by itself
    inputs    numbers of the steps that feed it; −1 is the network's input
    channels  of its output: the size of the second axis
    """

    kind: str
    module: str
    inputs: tuple[int, ...]
    channels: int


@dataclass(frozen=True)
class Block:
    """The layers between a shortcut's two ends, and the step that is the shortcut's side of the sum."""

    layers: tuple[int, ...]
    shortcut: int


@dataclass(frozen=True)
class Chain:
    """norms: number of a layer -> the batch norm that directly follows it and goes with it."""

    steps: tuple[Step, ...]
    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    norms: dict[int, str]

    def block_of(self, number: int) -> Block | None:
        """The shortest block that the layer is in."""
        found = [block for block in self.blocks if number in block.layers]
        return min(found, key=lambda block: len(block.layers), default=None)


def read_chain(module: nn.Module, example: Example) -> Chain:
    """Reads the layers of a module.

    Raises:
        CheckpointError: The forward cannot be traced.
    """
    graph = trace(module, example)
    modules = dict(module.named_modules())
    steps = _steps(graph.graph, graph.tensors, set(graph.constants), modules)
    places = [number for number, step in enumerate(steps) if step.module and step.kind in ("conv", "linear", "pool")]
    blocks = _blocks(steps, places)
    calls = Counter(step.module for step in steps if step.module)
    norms, layers = _norms(steps, places, modules), []
    shortcuts = {layer for block in blocks for layer in _upstream(steps, places)[block.shortcut] - _before(
        steps, places, block)}  # fmt: skip
    for number, place in enumerate(places):
        step = steps[place]
        layer = _layer(step, modules[step.module])
        fixed = _fixed(number, len(places), layer, modules[step.module], calls[step.module], number in shortcuts)
        owner = min((b for b in blocks if number in b.layers), key=lambda b: len(b.layers), default=None)
        spans = {}
        if owner is not None:
            index = owner.layers.index(number)
            spans = {"skip_start": index, "skip_end": len(owner.layers) - index - 1}
        last = owner is not None and owner.layers[-1] == number
        alone = calls[step.module] == 1 and getattr(modules[step.module], "groups", 1) == 1
        shrinks = _shrinks(layer, number, len(places), last) if alone else ()
        layers.append(dataclasses.replace(layer, fixed=fixed, shrinks=shrinks, **spans))
    return Chain(tuple(steps), tuple(layers), tuple(blocks), norms)


def _steps(graph: fx.Graph, tensors: dict[str, str], constants: set[str], modules: dict[str, nn.Module]) -> list[Step]:
    numbers: dict[fx.Node, int] = {}
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.name not in tensors and node.name not in constants:
            numbers[node] = -1
        if node.op != "call_function":
            continue
        feeds = tuple(numbers[each] for each in node.all_input_nodes if each in numbers)
        name = getattr(node.target, "_schema", None)
        name = name.name.split("::")[1] if name is not None else "getitem"
        if name == "getitem" and feeds:
            numbers[node] = feeds[0]
            continue
        weights = [tensors[each.name] for each in node.all_input_nodes if each.name in tensors]
        shape = _shape(node)
        owner = weights[0].rpartition(".")[0] if weights else ""
        kind = _kind(name, feeds)
        if kind == "pool":
            owner = _called(node, modules)
        if kind in ("conv", "linear", "norm") and not owner:
            kind = "other"
        numbers[node] = len(steps)
        steps.append(Step(kind, owner if kind != "other" else "", feeds, shape[1] if len(shape) > 1 else 0))
    return steps


def _kind(name: str, feeds: tuple[int, ...]) -> str:
    if name in _CONVOLUTIONS:
        return "conv"
    if name in ("linear", "addmm"):
        return "linear"
    if name in _NORMS:
        return "norm"
    if "pool" in name:
        return "pool"
    if name in ("add", "add_") and len(feeds) == 2:
        return "add"
    return "cat" if name == "cat" else "other"


def _shape(node: fx.Node) -> tuple[int, ...]:
    val: Any = node.meta.get("val")
    val = val[0] if isinstance(val, (tuple, list)) else val
    return tuple(getattr(val, "shape", ()))


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The pooling module that an operator is the whole of; empty where a forward calls a function."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1] if paths and "Pool" in type(modules.get(paths[-1])).__name__ else ""


def _upstream(steps: list[Step], places: list[int]) -> list[frozenset[int]]:
    """The layers that what comes out of each step went through."""
    number = {place: i for i, place in enumerate(places)}
    found: list[frozenset[int]] = []
    for place, step in enumerate(steps):
        seen = frozenset[int]().union(*(found[i] for i in step.inputs if i >= 0))
        found.append(seen | {number[place]} if place in number else seen)
    return found


def _blocks(steps: list[Step], places: list[int]) -> list[Block]:
    through, found = _upstream(steps, places), []
    for step in steps:
        if step.kind != "add":
            continue
        first, second = (through[i] if i >= 0 else frozenset[int]() for i in step.inputs)
        a, b = first - second, second - first
        main, shortcut = (a, step.inputs[1]) if len(a) >= len(b) else (b, step.inputs[0])
        if main:
            found.append(Block(tuple(sorted(main)), shortcut))
    return found


def _before(steps: list[Step], places: list[int], block: Block) -> frozenset[int]:
    """The layers before the block."""
    return _upstream(steps, places)[places[block.layers[0]]] - {block.layers[0]}


def _norms(steps: list[Step], places: list[int], modules: dict[str, nn.Module]) -> dict[int, str]:
    number = {place: i for i, place in enumerate(places)}
    users = Counter(i for step in steps for i in step.inputs)
    return {
        number[step.inputs[0]]: step.module
        for step in steps
        if step.kind == "norm" and isinstance(modules[step.module], nn.modules.batchnorm._BatchNorm)
        and step.inputs and step.inputs[0] in number and users[step.inputs[0]] == 1
    }  # fmt: skip


def _layer(step: Step, module: Any) -> Layer:
    def first(name: str) -> int:
        value = getattr(module, name, 0)
        value = value[0] if isinstance(value, tuple) else value
        return value if isinstance(value, int) else 0

    return Layer(step.module, step.kind, first("kernel_size"), first("stride"), step.channels, first("padding"))


def _fixed(number: int, n: int, layer: Layer, module: Any, calls: int, shortcut: bool) -> str:
    """Why a layer has to stay; empty where it can go."""
    reasons = {
        "is the first layer": number == 0,
        "is the last layer": number == n - 1,
        "is linear": layer.kind == "linear",
        "is an average pool": layer.kind == "pool" and "Max" not in type(module).__name__,
        "has a stride": layer.stride != 1 and layer.kind != "linear",
        "is called more than once": calls > 1,
        "is a shortcut": shortcut,
        "has groups": getattr(module, "groups", 1) not in (1, getattr(module, "in_channels", 1)),
        "is no plain convolution": layer.kind == "conv" and not isinstance(module, (nn.Conv1d, nn.Conv2d)),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _shrinks(layer: Layer, number: int, n: int, last_of_block: bool) -> tuple[str, ...]:
    if layer.kind == "pool" or number == n - 1:
        return ()
    able = {"outputs": not last_of_block, "kernel": layer.kernel > 1, "padding": layer.padding > 0}
    return tuple(name for name, can in able.items() if can)
