"""A network with smaller ones in it: what the training of all of them together, and their export, know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Size:
    """A smaller network within another: each of its tensors is the beginning of one of the other's, or its own.

    name     as users call it
    module   the network of this size alone
    renamed  tensor of `module` -> the other's, where they are not called the same: blocks are numbered anew
    facts    what is said of it
    """

    name: str
    module: nn.Module
    renamed: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Foretold:
    """A smaller network within another before it is made.

    name  as users call it
    held  each of its tensors -> the other's, and its shape: the beginning of that one
    own   those of which it will have values of its own
    """

    name: str
    held: Mapping[str, tuple[str, tuple[int, ...]]]
    own: frozenset[str]


class Nested(nn.Module, ABC):
    """Networks that are trained together; its parameters are all that learns.

    splits   whether each that is drawn learns on a part of the batch of its own
    teaches  whether the first that is drawn teaches the others
    """

    splits: bool
    teaches: bool

    @abstractmethod
    def drawn(self, generator: torch.Generator) -> Sequence[nn.Module]:
        """The networks that learn in a step."""

    @abstractmethod
    def gather(self, drawn: Sequence[nn.Module]) -> None:
        """Makes of their gradients those of its parameters, in place."""
