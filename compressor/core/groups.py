"""What goes or stays together: entries of tensors that are one channel, head or neuron, and whole branches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

MemberRole = Literal["producer", "consumer"]


@dataclass(frozen=True, eq=False)
class Member:
    """The entries of one tensor, along one dimension, that belong to the units of a group.

    tensor   name among the module's parameters and buffers; a tied one by its first name
    dim      of the tensor
    index    LongTensor (units, per_unit): positions along `dim`; a head of GPT-2's packed attention has 3 · head size
    role     producer: rows, biases and norm entries, which make the unit and are zero where it is masked; consumer:
             the columns that read it and a norm's running statistics, which are removed with it but say nothing of it
    """

    tensor: str
    dim: int
    index: Tensor
    role: MemberRole


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind, any of which can be removed while the others stay.

    name      of the first producer, without ".weight"
    size      how many units
    members   the entries of tensors that make a unit, or read it
    reason    why none of them can be removed; empty where they can
    """

    name: str
    size: int
    members: tuple[Member, ...]
    reason: str = ""

    def __repr__(self) -> str:
        return (
            f"Group({self.name!r}, {self.size} units, {len(self.members)} members{self.reason and ': '}{self.reason})"
        )

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that are the zero-invariant group."""
        return tuple(member for member in self.members if member.role == "producer")


@dataclass(frozen=True, eq=False)
class Operator(Group):
    """One whole branch, from where it leaves the rest to the sum that it is added in; a group of one unit.

    nodes   of the traced graph that are in it
    cut     what stands in its place: path -> kind and n_outputs of a `core.absent.Absent`
    whole   it is a block of a list, which becomes shorter: nothing stands in its place
    """

    nodes: frozenset[str] = frozenset()
    cut: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Branches:
    """The operators of a network that can be erased, and what feeds what.

    feeds   node of the traced graph -> the nodes that it reads, in execution order; the network's inputs read nothing
    sums    those of which one input is enough
    """

    operators: tuple[Operator, ...]
    feeds: Mapping[str, tuple[str, ...]]
    sums: frozenset[str]

    def connected(self, gone: Collection[Operator]) -> bool:
        """Whether all that stays is still fed without these: the only path is never erased."""
        erased = frozenset[str]().union(*(operator.nodes for operator in gone))
        fed: set[str] = set()
        for node, feeds in self.feeds.items():
            if node in erased:
                continue
            alive = [feed in fed for feed in feeds]
            if not (any(alive) if node in self.sums else all(alive)):
                return False
            fed.add(node)
        return True
