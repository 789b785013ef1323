"""The dependency groups of a network: which channels, heads and neurons can be removed, and what goes with each.

After Fang et al., DepGraph (CVPR 2023, arXiv 2301.12900) and Chen et al., OTOv3 (arXiv 2312.09411) in what has to go
together; found here by running the traced network on labels (`compressor.graph.labels`) instead of by patterns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from compressor.core.groups import Group, Member
from compressor.core.tensors import named_tensors
from compressor.graph.labels import HIDDEN, Labels
from compressor.graph.propagation import Propagation
from compressor.graph.tracing import Example, trace

if TYPE_CHECKING:
    from compressor.core.groups import MemberRole

__all__ = ["Group", "Member", "find_groups"]

_Entry = tuple[str, int, "MemberRole", np.ndarray]


def find_groups(module: nn.Module, example_inputs: Example) -> list[Group]:
    """The groups of a module, in the order of its parameters; those of which nothing can be removed say why.

    Args:
        example_inputs: Arguments of its forward, by position or by name; they are traced, not learned from.

    Raises:
        CheckpointError: The forward cannot be traced.
    """
    run = Propagation(trace(module, example_inputs), Labels())
    run.run()
    _fix_packed_attention(module, run)
    root, reasons = run.labels.classes()
    classes: dict[int, list[_Entry]] = defaultdict(list)
    order = {name: i for i, name in enumerate(named_tensors(module))}
    hidden = frozenset(label for label, reason in reasons.items() if reason == HIDDEN)
    for (name, dim), symbols in sorted(run.symbols.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        reader = (name, dim) in run.statistics or (name, dim) in run.consumed
        role: MemberRole = "consumer" if reader else "producer"
        for label, places in _places(root[symbols.numpy()], hidden):
            classes[label].append((name, dim, role, places))
    return _assembled(classes, reasons)


def _places(labels: np.ndarray, hidden: frozenset[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Each label with its positions, ascending."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    for label, places in zip(found, np.split(order, starts[1:]), strict=True):
        if label not in hidden:
            yield int(label), places


def _assembled(classes: dict[int, list[_Entry]], reasons: dict[int, str]) -> list[Group]:
    """Classes that have the same number of entries in the same tensors are the units of one group."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for label, entries in classes.items():
        if any(role == "producer" for _, _, role, _ in entries):
            shape = tuple((name, dim, role, len(places)) for name, dim, role, places in entries)
            alike[(*shape, reasons.get(label, ""))].append(label)
    groups, taken = [], defaultdict(int)
    for key, labels in alike.items():
        first = next(i for i, entry in enumerate(classes[labels[0]]) if entry[2] == "producer")
        labels = sorted(labels, key=lambda label: int(classes[label][first][3][0]))
        members = tuple(
            Member(name, dim, torch.from_numpy(np.stack([classes[label][i][3] for label in labels])), role)
            for i, (name, dim, role, _) in enumerate(classes[labels[0]])
        )
        name = members[first].tensor.removesuffix(".weight")
        taken[name] += 1
        reason = key[-1] or ("its entries can only go all together" if len(labels) == 1 else "")
        groups.append(Group(f"{name}#{taken[name]}" if taken[name] > 1 else name, len(labels), members, reason))
    return groups


def _fix_packed_attention(module: nn.Module, run: Propagation) -> None:
    """torch's own attention insists that heads times head size is its width, which has to stay."""
    for name, child in module.named_modules():
        if isinstance(child, nn.MultiheadAttention):
            for tensor in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
                symbols = run.symbols.get((f"{name}.{tensor}" if name else tensor, 0))
                if symbols is not None:
                    run.labels.fix(symbols, f"torch's MultiheadAttention '{name}' fixes heads × head size to its width")
