"""Tensors of the files that the network does not take: listed, and refused where the network would be another one
without them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Protocol

from compressor.checkpoints.source import Source
from compressor.core.errors import CheckpointError
from compressor.core.roles import folded

AVERAGES = re.compile(
    r"(^|[_.])(ema|swa|avg|average|averaged|polyak|momentum_encoder|teacher|target)(?=$|[_.])", re.IGNORECASE
)
"""In names of weights that are a running average of others."""
ADAPTERS = re.compile(r"(^|[_.])(lora|hada|lokr|loha|dora|vera|ia3|oft)(?=$|[_.])|magnitude_vector", re.IGNORECASE)
"""In names of what is added to a weight, and was not yet."""
MOST = 0.3
"""Of the numbers of the network: the share that may be left out."""
SHOWN = 4


class Holder(Protocol):
    """What of a checkpoint is asked."""

    path: object
    architecture: str
    source: Source
    notes: list[str]


def refuse_unused(checkpoint: Holder, expected: Collection[str], unused: list[str]) -> None:
    """Notes what is not taken.

    Args:
        expected: The names of the module's tensors.
        unused: Stored names.

    Raises:
        CheckpointError: They are adapters that were not merged, further blocks of the network, or many.
    """
    if not unused:
        return
    tensors = checkpoint.source.tensors
    kinds = {folded(name) for name in expected}
    adapters = [name for name in unused if ADAPTERS.search(name)]
    further = [name for name in unused if folded(name) in kinds and folded(name) != name]
    others = [name for name in unused if not AVERAGES.search(name)]
    n_numbers = sum(info.numel for info in tensors.values())
    share = sum(tensors[name].numel for name in others) / max(1, n_numbers)
    why = ""
    if adapters:
        why = f"adapters that are not merged into the weights; found {listed(adapters)}; merge them and save again"
    elif further:
        why = (
            f"more blocks than {checkpoint.architecture} has; found {listed(further)}; correct the number of layers in "
            "the config, or the module of --arch"
        )
    elif share > MOST:
        why = (
            f"much that {checkpoint.architecture} does not take, {share:.0%} of its numbers; found {listed(others)}; "
            "give the right config or --arch, or save the part that is the network alone"
        )
    if why:
        raise CheckpointError(f"{checkpoint.path}: holds {why}")
    averaged = "; by their names they are an average of the weights" if len(others) < len(unused) else ""
    checkpoint.notes.append(f"{len(unused)} tensors of the file are not used: {listed(unused)}{averaged}")


def listed(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more
