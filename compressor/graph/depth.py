"""What can be taken out of a network of repeated blocks: whole blocks, or the attention and the MLP of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.absent import Absent, cut_list, replace
from compressor.core.errors import CheckpointError
from compressor.graph.blocks import block_names, first_tensor, layers, patched

_SAME = 1e-6


@dataclass(frozen=True)
class Unit:
    """A block, or a part of one whose output has its shape.

    kind    block, attention, mlp or part
    block   the number of the block that it is or belongs to
    absent  what is left without it: identity, or zeros where the residual sum is outside
    """

    name: str
    kind: str
    block: int
    absent: str
    n_outputs: int


def depth_units(module: nn.Module, call: Callable[[], Any], parts: bool) -> list[Unit]:
    """The units of a module in the order of a forward.

    Args:
        call: Runs the module on an example.
        parts: The attention and the MLP of each block instead of the whole.

    Raises:
        CheckpointError: There are no repeated blocks, or they change what goes through them.
    """
    names = block_names(module)
    if names == [""]:
        raise CheckpointError(
            f"{type(module).__name__}: has no list of repeated blocks to remove some of; write units: layer"
        )
    seen = _watched(module, names, call)
    found: list[Unit] = []
    for number, name in enumerate(names):
        if name not in seen:
            raise CheckpointError(f"{type(module).__name__}: '{name}' is never called on its own; write units: layer")
        (args, kwargs), output = seen[name]
        hidden, after = hidden_of(args, kwargs), first_tensor(output)
        if hidden.shape != after.shape:
            raise CheckpointError(
                f"{type(module).__name__}: '{name}' takes {tuple(hidden.shape)} and gives {tuple(after.shape)}; only "
                "blocks that keep the shape can go; write units: layer"
            )
        if not parts:
            found.append(Unit(name, "block", number, "identity", _n_outputs(output)))
        else:
            found += _parts(module.get_submodule(name), name, number, args, kwargs)
    if not found:
        raise CheckpointError(
            f"{type(module).__name__}: no part of its blocks keeps the shape of what goes through; write units: block"
        )
    return found


def without_units(module: nn.Module, units: Sequence[Unit]) -> nn.Module:
    """A copy without them: blocks leave their list, parts become `Absent`."""
    smaller = copy.deepcopy(module)
    for unit in units:
        if unit.kind != "block":
            replace(smaller, unit.name, Absent(unit.absent, unit.n_outputs))
    gone = {unit.name for unit in units if unit.kind == "block"}
    if gone:
        path = next(iter(gone)).rpartition(".")[0]
        children = [f"{path}.{name}" for name, _ in module.get_submodule(path).named_children()]
        cut_list(smaller, path, [i for i, name in enumerate(children) if name not in gone])
    return smaller


@torch.no_grad()
def _watched(module: nn.Module, names: Sequence[str], call: Callable[[], Any]) -> dict[str, tuple[Any, Any]]:
    """Block -> the arguments and the output of its call in a forward."""
    seen: dict[str, tuple[Any, Any]] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen.__setitem__(name, ((args, kwargs), output)),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _parts(block: nn.Module, name: str, number: int, args: tuple, kwargs: dict) -> list[Unit]:
    """The children that keep the shape and have two layers or more, each with what is left without it."""
    outputs: dict[str, Any] = {}
    order: list[str] = []
    candidates = {path: child for path, child in block.named_children() if len(layers(child)) > 1}

    def note(path: str, output: Any) -> None:
        outputs[path] = output
        order.append(path)

    handles = [
        child.register_forward_hook(lambda _, __, output, path=path: note(path, output))
        for path, child in candidates.items()
    ]
    with torch.no_grad():
        block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    shape = hidden_of(args, kwargs).shape
    found = []
    for path in order:
        n_outputs = _n_outputs(outputs[path])
        if order.count(path) == 1 and first_tensor(outputs[path]).shape == shape:
            kind = "attention" if "att" in path.lower() else "mlp" if _is_mlp(path) else "part"
            left = "zeros" if _adds(block, candidates[path], n_outputs, args, kwargs) else "identity"
            found.append(Unit(f"{name}.{path}", kind, number, left, n_outputs))
    return found


def _is_mlp(path: str) -> bool:
    return any(word in path.lower() for word in ("mlp", "ffn", "feed_forward", "feedforward", "ff"))


@torch.no_grad()
def _adds(block: nn.Module, child: nn.Module, n_outputs: int, args: tuple, kwargs: dict) -> bool:
    """Whether the block's residual sum lies outside of the child: with zeros from it the input still gets through."""
    hidden = hidden_of(args, kwargs)
    other_args, other_kwargs = with_hidden(args, kwargs, hidden.flip(-1) + 1)
    with patched({child: Absent("zeros", n_outputs).forward}):
        first = first_tensor(block(*args, **kwargs))
        second = first_tensor(block(*other_args, **other_kwargs))
    return float((first - second).abs().max()) > _SAME * float(first.abs().max())


def _n_outputs(output: Any) -> int:
    """0 for a tensor alone."""
    return 0 if isinstance(output, Tensor) else len(output)


def hidden_of(args: tuple, kwargs: dict) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    """The same arguments with another hidden state, which is the first tensor among them."""
    for number, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:number], hidden, *args[number + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, kwargs | {name: hidden}
