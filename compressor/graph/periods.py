"""Rows of blocks that repeat: which of them tell what all of them do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from compressor.graph.blocks import block_names

_PLAIN = (bool, int, float, str, type(None))
_COUNTS = ("layer_idx", "layer_id", "block_idx", "_is_hf_initialized", "training")
"""What blocks differ in that are of one kind."""


@dataclass(frozen=True)
class Period:
    """Blocks of which, from `start` on, each is of the kind of the one `length` blocks before.

    names   of all of them
    """

    names: tuple[str, ...]
    start: int
    length: int

    @property
    def seen(self) -> int:
        """So many of the first blocks have the period twice."""
        return self.start + 2 * self.length


def period_of(module: nn.Module) -> Period | None:
    """The period of a network's blocks; None where it is not seen three times. The first block is in none."""
    names, kinds = _blocks_of(module)
    found = None
    for length in range(1, len(kinds) // 3 + 1):
        differing = [i for i in range(1, len(kinds) - length) if kinds[i] != kinds[i + length]]
        start = 1 + max(differing, default=0)
        start += (len(kinds) - start) % length
        period = Period(tuple(names), start, length)
        if period.seen < len(kinds) and (found is None or period.seen < found.seen):
            found = period
    return found


def as_few_as_tell(module: nn.Module) -> nn.Module | None:
    """A copy whose list of blocks ends where all kinds of them have been seen; None where that is no shorter."""
    names, kinds = _blocks_of(module)
    n = max(2, 1 + max((kinds.index(kind) for kind in kinds), default=0))
    return first_blocks(module, names, n) if n < len(kinds) else None


def _blocks_of(module: nn.Module) -> tuple[list[str], list[tuple[object, ...]]]:
    """The blocks' names, and what kind each is; none where there is but one."""
    names = block_names(module)
    return names, [kind_of_block(module.get_submodule(name)) for name in names] if len(names) > 1 else []


def first_blocks(module: nn.Module, names: list[str] | tuple[str, ...], n: int) -> nn.Module:
    """A copy with the first `n` of the blocks of these names. Its parameters are the same objects."""
    holder, _, _ = names[0].rpartition(".")
    parent, _, attribute = holder.rpartition(".")
    memo: dict[int, Any] = {id(each): each for each in module.parameters()}
    memo |= {id(block): block for block in (module.get_submodule(name) for name in names[n:])}
    short = copy.deepcopy(module, memo)
    blocks = short.get_submodule(holder)
    assert isinstance(blocks, nn.ModuleList)
    setattr(short.get_submodule(parent), attribute, blocks[:n])
    return short


def kind_of_block(block: nn.Module) -> tuple[object, ...]:
    """What blocks of one kind have in common: their modules, plain settings of these, and shapes of parameters."""
    parts = []
    for name, child in block.named_modules():
        settings = {key: value for key, value in vars(child).items() if key not in _COUNTS}
        plain = sorted((key, str(value)) for key, value in settings.items() if isinstance(value, _PLAIN))
        shapes = [(key, tuple(each.shape)) for key, each in child.named_parameters(recurse=False)]
        parts.append((name, type(child), tuple(plain), tuple(shapes)))
    return tuple(parts)
