"""The branches of a network that can be erased whole: what lies between two joins, and takes its weights with it.

After the erasing mode of Chen et al., OTOv3, arXiv 2312.09411: a segment is erasable where every successor is a join.
Joins are sums here: what is concatenated, multiplied or read on its own stays. A branch is what only one side of a sum
goes through, with whatever forks and joins inside of it, so that squeeze-excite and attention are branches as well.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from compressor.core.absent import Absent, replace
from compressor.core.groups import Branches, Member, Operator
from compressor.graph.blocks import first_tensor
from compressor.graph.tracing import Example, Trace, split_example, trace

_CLOSE = 1e-5


def find_branches(module: nn.Module, example: Example) -> Branches:
    """The branches of a module that can be erased, in the order of their sums; each was erased on the example.

    Args:
        module: In eval mode; what is tried on it is undone.
        example: Arguments of its forward, by position or by name.

    Raises:
        CheckpointError: The forward cannot be traced.
    """
    graph = trace(module, example)
    feeds = _feeds(graph)
    readers = _readers(graph, feeds, {name for name, _ in module.named_parameters()})
    sums = [node for node in feeds if _is_sum(node) and len(set(feeds[node])) == 2]
    above: dict[fx.Node, frozenset[fx.Node]] = {}
    for node, nodes in feeds.items():
        above[node] = frozenset({node}).union(*(above[each] for each in nodes))
    found, outputs = [], _output_counts(module, example)
    for node in sums:
        for side, other in (feeds[node], feeds[node][::-1]):
            branch = _ending_in(node, above[side] - above[other], feeds)
            if side in branch and _shape(other) == _shape(node):
                operator = _operator(module, example, readers, outputs, branch)
                if operator is not None:
                    found.append(operator)
    names = {node.name: tuple(each.name for each in nodes) for node, nodes in feeds.items()}
    return Branches(tuple(found), names, frozenset(node.name for node in sums))


def erase(module: nn.Module, cut: Mapping[str, tuple[str, int]]) -> None:
    """Puts what a branch leaves behind in its place, in place."""
    for path, (kind, n_outputs) in cut.items():
        replace(module, path, Absent(kind, n_outputs))


def _feeds(graph: Trace) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """What the network's output is made of and depends on its inputs, and what of that it reads."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    read = _read(graph.graph)
    for node in graph.graph.nodes:
        if node not in read:
            continue
        if node.op == "placeholder" and node.name not in graph.tensors and node.name not in graph.constants:
            found[node] = ()
        elif node.op == "call_function":
            feeds = tuple(each for each in node.all_input_nodes if each in found)
            if feeds:
                found[node] = feeds
    return found


def _readers(graph: Trace, feeds: Collection[fx.Node], parameters: Collection[str]) -> dict[str, set[fx.Node]]:
    """Parameter -> what reads it, also through what is computed from parameters alone; in the order of a forward."""
    names: dict[fx.Node, list[str]] = {}
    for node in graph.graph.nodes:
        if graph.tensors.get(node.name) in parameters:
            names[node] = [graph.tensors[node.name]]
        elif node.op == "call_function" and node not in feeds:
            names[node] = [name for each in node.all_input_nodes for name in names.get(each, ())]
    found: dict[str, set[fx.Node]] = defaultdict(set)
    for node in feeds:
        for each in node.all_input_nodes:
            for name in names.get(each, ()):
                found[name].add(node)
    return found


def _read(graph: fx.Graph) -> set[fx.Node]:
    """All that the output is made of; assertions about shapes are not."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in found for user in node.users):
            found.add(node)
    return found


def _is_sum(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name.split("::")[-1] in ("add", "add_") and bool(node.kwargs.get("alpha", 1) == 1)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _ending_in(end: fx.Node, nodes: Collection[fx.Node], read: Collection[fx.Node]) -> frozenset[fx.Node]:
    """Those that are read for the sum only; a mask that other branches read as well is not."""
    found: set[fx.Node] = set()
    for node in reversed(list(read)):
        if node in nodes and all(user in found or user is end or user not in read for user in node.users):
            found.add(node)
    return frozenset(found)


def _operator(
    module: nn.Module, example: Example, readers: Mapping[str, set[fx.Node]], outputs: Mapping[str, int],
    branch: frozenset[fx.Node],
) -> Operator | None:  # fmt: skip
    """The branch, if it can be erased: the network without it is what it is where the branch's own weights are zero."""
    weights = [name for name, nodes in readers.items() if nodes <= branch]
    parameters = {name: module.get_parameter(name) for name in weights}
    if not weights or any(not tensor.dim() for tensor in parameters.values()):
        return None
    owners = list(dict.fromkeys(_owner(name) for name in weights))
    for cut in _cuts(module, outputs, owners):
        if _is_exact(module, example, weights, cut):
            members = tuple(
                Member(name, 0, torch.arange(len(tensor)).unsqueeze(0), "producer")
                for name, tensor in parameters.items()
            )
            nodes = frozenset(node.name for node in branch)
            return Operator(_title(owners), 1, members, nodes=nodes, cut=cut)
    return None


def _owner(name: str) -> str:
    """The module that computes with a tensor."""
    path, parametrised, _ = name.partition(".parametrizations.")
    return path if parametrised else name.rpartition(".")[0]


def _title(owners: list[str]) -> str:
    """As in: blocks.3.conv1 to bn2."""
    first, last = owners[0].split("."), owners[-1].split(".")
    alike = next((i for i, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(last))
    return f"{owners[0]} to {'.'.join(last[alike:])}" if last[alike:] else owners[0]


def _cuts(module: nn.Module, outputs: Mapping[str, int], owners: list[str]) -> Iterator[dict[str, tuple[str, int]]]:
    """What could stand for a branch.

    The last of its layers adds nothing and the others pass on; or so its modules, the last of which passes on as well
    where it has the sum inside.
    """
    whole = list(dict.fromkeys(_largest(module, path, owners) for path in owners))
    for paths, last in ((owners, "nothing"), (whole, "nothing"), (whole, "identity")):
        outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        yield {path: (last if path == outer[-1] else "identity", outputs.get(path, 0)) for path in outer}


def _largest(module: nn.Module, path: str, owners: list[str]) -> str:
    """The largest module around that one all of whose weights are the branch's."""
    found = path
    while parent := found.rpartition(".")[0]:
        named = module.get_submodule(parent).named_modules(prefix=parent)
        if not {name for name, child in named if child._parameters} <= set(owners):
            break
        found = parent
    return found


def _output_counts(module: nn.Module, example: Example) -> dict[str, int]:
    """How many outputs those modules give that give a tuple, from one forward."""
    found: dict[str, int] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, (tuple, list)):
                found[path] = len(output)

        return note

    handles = [child.register_forward_hook(hook(path)) for path, child in module.named_modules()]
    try:
        _output(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _output(module: nn.Module, example: Example) -> Tensor:
    args, kwargs = split_example(example)
    return first_tensor(module(*args, **kwargs))


@torch.no_grad()
def _is_exact(
    module: nn.Module, example: Example, weights: Collection[str], cut: Mapping[str, tuple[str, int]]
) -> bool:
    """Whether the network with the cut computes what it does where these weights are zero."""
    if "" in cut:
        return False
    calls = Counter[str]()
    smaller = copy.deepcopy(module)
    erase(smaller, cut)
    for path in cut:
        smaller.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.update([path]))
    try:
        found = _output(smaller, example)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # what shapes that do not fit raise
        return False
    tensors = {name: module.get_parameter(name) for name in weights}
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.zero_()
        wanted = _output(module, example)
    finally:
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
    close = found.shape == wanted.shape and float((found - wanted).abs().max()) <= _CLOSE * float(wanted.abs().max())
    return close and all(n == 1 for n in calls.values())
