"""As few of a network's blocks as there are kinds of them: what torch can trace of these it can trace of all."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from compressor.graph.blocks import block_names

_PLAIN = (bool, int, float, str, type(None))
_COUNTS = ("layer_idx", "layer_id", "block_idx", "_is_hf_initialized", "training")
"""What blocks differ in that are of one kind."""


def shortened(module: nn.Module) -> nn.Module | None:
    """A copy whose list of blocks ends where all kinds of them have been seen; None where that is no shorter.

    Blocks are of one kind where their modules, the shapes of their parameters, and their plain settings are the same.
    """
    names = block_names(module)
    if len(names) < 2:
        return None
    blocks = [module.get_submodule(name) for name in names]
    kinds = [_kind(block) for block in blocks]
    last = max(kinds.index(kind) for kind in kinds)
    n = max(last + 1, 2)
    if n >= len(blocks):
        return None
    holder, _, _ = names[0].rpartition(".")
    parent, _, attribute = holder.rpartition(".")
    memo: dict[int, Any] = {id(each): each for each in module.parameters()}  # shared: they are on meta
    memo |= {id(each): each for block in blocks[n:] for each in (block, *block.buffers())}
    short = copy.deepcopy(module, memo)
    blocks_of = short.get_submodule(holder)
    assert isinstance(blocks_of, nn.ModuleList)
    setattr(short.get_submodule(parent), attribute, blocks_of[:n])
    return short


def _kind(block: nn.Module) -> tuple[object, ...]:
    parts = []
    for name, child in block.named_modules():
        settings = {key: value for key, value in vars(child).items() if key not in _COUNTS}
        plain = sorted((key, value) for key, value in settings.items() if isinstance(value, _PLAIN))
        shapes = [(key, tuple(each.shape)) for key, each in child.named_parameters(recurse=False)]
        parts.append((name, type(child), tuple(map(str, plain)), tuple(shapes)))
    return tuple(parts)
