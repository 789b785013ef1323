"""What is left where a layer, a block or a part of one has been taken out of a network.

Code of a forward still calls what was there: an `Absent` passes its input on, or adds nothing. Blocks of a list go
altogether, and the list remembers which of its first ones it kept. So a network tells by itself what was taken out of
it, and `checkpoints.reshaped` can write that down.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("identity", "zeros", "nothing")
KEPT = "kept_children"
NUMBERS = ("layer_idx", "layer_id", "layer_index")
"""Attributes by which a block of transformers knows its place in the list."""


class Absent(nn.Module):
    """Passes its first tensor on (identity), or zeros of its shape, or one zero, which adds to any shape (nothing).

    n_outputs   of a tuple with None behind it; 0: the tensor alone
    """

    def __init__(self, kind: str, n_outputs: int = 0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        self.kind, self.n_outputs = kind, n_outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is None:
            raise TypeError("what is absent was called without a tensor to pass on")
        zeros = torch.zeros_like(tensor) if self.kind == "zeros" else tensor.new_zeros(())
        found = tensor if self.kind == "identity" else zeros
        return (found, *[None] * (self.n_outputs - 1)) if self.n_outputs else found

    def extra_repr(self) -> str:
        return self.kind


def replace(module: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where the child of that path is, in place."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def cut_list(module: nn.Module, path: str, kept: Sequence[int]) -> None:
    """Leaves these children of a ModuleList or Sequential, in order and numbered anew, in place.

    A transformers config that counts them, or has a list of that length, follows.
    """
    holder = module.get_submodule(path)
    children, before = list(holder.children()), kept_children(holder)
    holder._modules.clear()
    for number, place in enumerate(kept):
        holder._modules[str(number)] = children[place]
        for child in children[place].modules():
            for name in NUMBERS:
                if type(getattr(child, name, None)) is int:
                    setattr(child, name, number)
    setattr(holder, KEPT, [before[place] for place in kept])
    configs = {id(config): config for child in module.modules() if (config := getattr(child, "config", None))}
    for config in configs.values():
        follow_depth(vars(config), len(children), kept)


def kept_children(holder: nn.Module) -> list[int]:
    """Which of the list's first children it has now."""
    return getattr(holder, KEPT, None) or list(range(len(list(holder.children()))))


DEPTH = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|num_decoder_layers|encoder_layers)$")


def follow_depth(config: dict[str, Any], n_before: int, kept: Sequence[int]) -> None:
    """Counts of layers and lists with an entry for each, in place."""
    for name, value in list(config.items()):
        if DEPTH.match(name) and value == n_before:
            config[name] = len(kept)
        elif isinstance(value, list) and len(value) == n_before and name.startswith(("layer", "no_rope_layer")):
            config[name] = [value[place] for place in kept]


def cuts(module: nn.Module) -> tuple[dict[str, list[int]], dict[str, list[Any]]]:
    """What was taken out: lists with the children that they kept, and what is absent: path -> [kind, n_outputs]."""
    lists = {path: getattr(child, KEPT) for path, child in module.named_modules() if getattr(child, KEPT, None)}
    absent = {
        path: [child.kind, child.n_outputs] for path, child in module.named_modules() if isinstance(child, Absent)
    }
    return lists, absent


def apply_cuts(module: nn.Module, lists: dict[str, list[int]], absent: dict[str, list[Any]]) -> nn.Module:
    """Takes out of the original what was taken out of another, in place; the same object."""
    for path, kept in lists.items():
        cut_list(module, path, kept)
    for path, (kind, n_outputs) in absent.items():
        replace(module, path, Absent(kind, n_outputs))
    return module
