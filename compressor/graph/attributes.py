"""Attributes that tell sizes, as out_channels or num_heads do, follow when tensors become smaller."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compressor.core.groups import Group

HEADS = re.compile(r"(^|_)(num_|n_)?(attention_|key_value_|kv_)?n?heads?$")
"""Attributes that count heads; `head_dim` and its kin stay."""
WIDTHS = frozenset(
    {"all_head_size", "inner_dim", "split_size", "hidden_features", "inner_size", "qkv_dim", "intermediate_size"}
)
"""Attributes of attentions and MLPs that tell a width between two of their layers."""


def follow(module: nn.Module, before: Mapping[str, torch.Size], removal: Mapping[Group, Tensor]) -> None:
    """Sets the attributes of the modules whose tensors changed, and of those that hold them.

    Args:
        module: With the smaller tensors.
        before: The shapes that these tensors had.
    """
    for owner in {name.rpartition(".")[0]: None for name in before}:
        resize(module.get_submodule(owner))
    for group, units in removal.items():
        _count_units(module, before, group, group.size - len(units.unique()))


def resize(module: Any) -> None:
    """Sets a layer's attributes by the shapes of its tensors."""
    for kind, change in _KNOWN.items():
        if isinstance(module, kind):
            change(module)
    if type(module).__name__ == "Conv1D":  # GPT-2's linear, stored (inputs, outputs)
        for name, size in zip(("nx", "nf"), module.get_parameter("weight").shape, strict=True):
            setattr(module, name, size)


def _count_units(module: nn.Module, before: Mapping[str, torch.Size], group: Group, kept: int) -> None:
    """Counts of heads, and widths, in the modules that own the group's tensors and in their parents."""
    heads = any(member.index.shape[1] > 1 for member in group.producers)
    sizes = {before[member.tensor][member.dim]: member.tensor for member in group.members}
    for path in {path: None for member in group.members for path in _holders(member.tensor)}:
        holder = module.get_submodule(path)
        for name, value in list(vars(holder).items()):
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if (heads and HEADS.search(name) and value % group.size == 0) or (name in WIDTHS and value in sizes):
                setattr(holder, name, value // group.size * kept)


def _holders(tensor: str) -> list[str]:
    """The module that owns a tensor, and the one that holds that."""
    owner = tensor.rpartition(".")[0]
    return [owner, owner.rpartition(".")[0]] if owner else [""]


def _convolution(module: Any) -> None:
    outputs, inputs, *_ = module.weight.shape
    if isinstance(module, _ConvTransposeNd):
        outputs, inputs = inputs, outputs
        if module.groups > 1:
            module.groups = inputs // (module.in_channels // module.groups)
            outputs *= module.groups
    elif module.groups > 1:
        module.groups = outputs // (module.out_channels // module.groups)
        inputs *= module.groups
    module.in_channels, module.out_channels = inputs, outputs


def _linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _batch_norm(module: Any) -> None:
    tensor = module.weight if module.weight is not None else module.running_mean
    module.num_features = len(tensor)


def _group_norm(module: Any) -> None:
    module.num_groups = len(module.weight) // (module.num_channels // module.num_groups)
    module.num_channels = len(module.weight)


def _prelu(module: Any) -> None:
    module.num_parameters = len(module.weight)


_KNOWN: dict[type[nn.Module], Callable[[Any], None]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    _NormBase: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
}
