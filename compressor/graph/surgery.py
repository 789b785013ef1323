"""Removes units of a network for good, or masks them; what is removed and what is masked compute the same."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn

from compressor.core.absent import cut_list
from compressor.core.errors import PassError
from compressor.core.groups import Group, Member, Operator
from compressor.core.structure import Removal
from compressor.core.tensors import named_tensors
from compressor.graph.attributes import follow
from compressor.graph.operators import erase


@torch.no_grad()
def zero_units(module: nn.Module, group: Group, units: Tensor) -> None:
    """Sets the producers' entries of these units to zero, in place: they then add nothing to the network's output."""
    tensors = named_tensors(module)
    for member in group.producers:
        tensors[member.tensor].index_fill_(member.dim, member.index[units].reshape(-1), 0)


@torch.no_grad()
def sort_units(module: nn.Module, group: Group, order: Tensor) -> None:
    """Puts unit order[i] of a group in the place of its unit i, in every tensor, in place."""
    tensors = named_tensors(module)
    for member in group.members:
        tensor = tensors[member.tensor].detach()
        moved = tensor.index_select(member.dim, member.index[order].reshape(-1))
        tensor.index_copy_(member.dim, member.index.reshape(-1), moved)


def remove_units(module: nn.Module, removal: Removal) -> nn.Module:
    """A network without these units: smaller tensors, and the attributes that tell their sizes.

    The module is left as it is; what is not smaller is copied.

    Raises:
        PassError: A group cannot lose units, or would lose all of them.
    """
    tensors = named_tensors(module)
    kept = {key: _kept(tensors[key[0]].shape[key[1]], places) for key, places in dropped(removal).items()}
    smaller: dict[str, Tensor] = {}
    for (name, dim), places in sorted(kept.items()):
        source = smaller.get(name, tensors[name].detach())
        smaller[name] = source.index_select(dim, places.to(source.device))
    memo: dict[int, object] = {}
    for name, values in smaller.items():
        old = tensors[name]
        memo[id(old)] = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
    found = copy.deepcopy(module, memo)
    channels = {group: units for group, units in removal.items() if not isinstance(group, Operator)}
    follow(found, {name: tensors[name].shape for name in smaller}, channels)
    shortened: dict[str, set[str]] = defaultdict(set)
    for group in removal:
        if isinstance(group, Operator) and group.whole:
            path, _, child = group.name.rpartition(".")
            shortened[path].add(child)
        elif isinstance(group, Operator):
            erase(found, group.cut)
    for path, gone in shortened.items():
        names = [name for name, _ in found.get_submodule(path).named_children()]
        cut_list(found, path, [place for place, name in enumerate(names) if name not in gone])
    return found


def predicted_parameters(module: nn.Module, removal: Removal) -> int:
    """How many parameters the network without these units will have."""
    return sum(torch.Size(shape).numel() for shape in shapes_without(module, removal).values())


def shapes_without(module: nn.Module, removal: Removal) -> dict[str, list[int]]:
    """The shapes that the parameters of the network without these units will have."""
    parameters = dict(module.named_parameters())
    return {name: shape for name, shape in tensor_shapes(module, removal).items() if name in parameters}


def tensor_shapes(module: nn.Module, removal: Removal) -> dict[str, list[int]]:
    """Those that its parameters and buffers will have, by the names that they have before."""
    operators = [group for group in removal if isinstance(group, Operator)]
    gone = {member.tensor for operator in operators for member in operator.members}
    behind = tuple(f"{path}." for operator in operators for path in operator.cut)
    shapes = {
        name: list(tensor.shape)
        for name, tensor in named_tensors(module).items()
        if name not in gone and not name.startswith(behind)
    }
    for (name, dim), places in dropped(removal).items():
        if name in shapes:
            shapes[name][dim] -= len(places)
    return shapes


def dropped(removal: Removal) -> dict[tuple[str, int], Tensor]:
    """(tensor, dimension) -> the positions that go, ascending; of tensors that stay."""
    found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group, units in removal.items():
        if isinstance(group, Operator):
            continue
        if group.reason:
            raise PassError(f"group '{group.name}': cannot lose units, as it {group.reason}")
        if len(units.unique()) >= group.size:
            raise PassError(f"group '{group.name}': would lose all of its {group.size} units; one has to stay")
        for member in group.members:
            found[member.tensor, member.dim].append(member.index[units].reshape(-1))
    return {key: torch.cat(places).unique() for key, places in found.items()}


def _kept(size: int, dropped: Tensor) -> Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[dropped] = False
    return keep.nonzero()[:, 0]


def entries(module: nn.Module, member: Member) -> Tensor:
    """The member's entries by unit: (units, entries of the unit), in the order of the tensor."""
    tensor = named_tensors(module)[member.tensor].movedim(member.dim, 0)
    return tensor[member.index].flatten(1)
