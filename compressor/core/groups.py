"""Dependency groups: which entries of which tensors are one channel, head or neuron, and so go or stay together."""

from __future__ import annotations

from dataclasses import dataclass
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
