"""The units of dependency groups as vectors: what a pass that trains them to zero sees of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.core.groups import Group
from compressor.core.tensors import named_tensors


class Units:
    """The zero-invariant groups of a module: unit i is entry i of every producer, flattened, one after the other.

    groups   in the order of all lists here
    sizes    entries per unit, of each group
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.tensors: dict[str, Tensor] = {}
        found = named_tensors(module)
        for group in groups:
            for member in group.producers:
                self.tensors[member.tensor] = found[member.tensor].detach()
        self.sizes = [vectors.shape[1] for vectors in self.vectors(self.tensors)]

    @property
    def n(self) -> int:
        """Units of all groups."""
        return sum(group.size for group in self.groups)

    def snapshot(self) -> dict[str, Tensor]:
        """The tensors that units have entries in, as they are now."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def vectors(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """x of every unit, (units, size) per group, from tensors by name."""
        return [
            torch.cat([tensors[m.tensor].movedim(m.dim, 0)[m.index].flatten(1) for m in group.producers], 1)
            for group in self.groups
        ]

    def write(self, number: int, vectors: Tensor) -> None:
        """Gives all units of a group new values, (units, size), in place."""
        parts = [self.tensors[member.tensor].movedim(member.dim, 0) for member in self.groups[number].producers]
        members = self.groups[number].producers
        widths = [m.index.shape[1] * part[0].numel() for m, part in zip(members, parts, strict=True)]
        for member, part, values in zip(members, parts, vectors.split(widths, 1), strict=True):
            part[member.index] = values.view(*member.index.shape, *part.shape[1:])

    def scale(self, factors: Sequence[Tensor]) -> None:
        """Multiplies every unit by its factor, (units,) per group, in place."""
        for group, values in zip(self.groups, factors, strict=True):
            if bool((values == 1).all()):
                continue
            for member in group.producers:
                tensor = self.tensors[member.tensor]
                along = torch.ones(tensor.shape[member.dim])
                along[member.index] = values.float().unsqueeze(1)
                tensor.mul_(along.view(-1, *[1] * (tensor.dim() - 1 - member.dim)))

    def split(self, values: Tensor) -> list[Tensor]:
        """(n,) over all units as (units,) per group."""
        return list(values.split([group.size for group in self.groups]))


def unit_scores(group: Group, layers: dict[str, Tensor]) -> Tensor:
    """A group's scores: its entries' summed in each tensor, averaged over the tensors that have scores.

    Args:
        layers: Scores along a layer's outputs (out,) by the name of its weight, or per weight, of the weight's shape.
    """
    found = []
    for member in group.producers:
        values = layers.get(member.tensor)
        if values is not None:
            along = values if values.dim() == 1 else values.movedim(member.dim, 0).flatten(1).sum(1)
            found.append(along[member.index].double().sum(1))
    return torch.stack(found).mean(0) if found else torch.full((group.size,), math.inf, dtype=torch.float64)
