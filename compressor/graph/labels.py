"""Labels of channels: every entry of a tensor that is one channel carries that channel's number.

A value of the network has *axes*: label tensors of the value's own shape, each constant along the dimensions that it
does not vary on (stride 0 there, so that a label tensor costs what its channels cost). Moving data moves labels: a
reshape, a transpose, a window partition is the same operation on the labels. Where two values meet entry by entry, the
labels that meet are the same channel; `Labels` notes that and gives the classes in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

HIDDEN = "has no units"
"""The reason of what is nobody's choice to remove: positions of a kernel, rows of a vocabulary."""
Origin = tuple[str, int]
"""A parameter and one of its dimensions."""


@dataclass(frozen=True, eq=False)
class Axis:
    """Labels of a value's shape.

    zero     whether the entries of a masked channel are zero at this point
    origin   the parameter's dimension that the labels are, before anything but movement happened to them
    """

    labels: Tensor
    zero: bool
    origin: Origin | None = None

    @property
    def varies(self) -> tuple[int, ...]:
        """The dimensions along which the labels change."""
        return varying(self.labels)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the network: its shape and the channels in it.

    constant   its values, where they are known
    even       the dimensions along which all of its entries are the same, so that any length of them would do
    """

    shape: torch.Size
    axes: tuple[Axis, ...] = ()
    constant: Tensor | None = None
    even: frozenset[int] = frozenset()

    @property
    def extents(self) -> set[int]:
        """The dimensions, counted from the last as −1, −2, …, that a channel would have to be removed from."""
        n = len(self.shape)
        return {dim - n for dim, size in enumerate(self.shape) if size > 1 and dim not in self.even}


def varying(labels: Tensor) -> tuple[int, ...]:
    return tuple(dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim) != 0)


def flat(labels: Tensor, dims: Sequence[int]) -> Tensor:
    """The same shape, with the first entry's labels all along `dims`."""
    found = labels
    for dim in dims:
        found = found.narrow(dim, 0, 1)
    return found.expand(labels.shape)


def thin(labels: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """Length 1 along the dimensions that the labels do not vary on, but for those of `keep`."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0 and dim not in keep:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """The same labels with stride 0 along every dimension on which they are constant."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) != 0:
            seen = thin(labels)
            if bool((seen == seen.narrow(dim, 0, 1)).all()):
                labels = flat(labels, (dim,))
    return labels


class Labels:
    """Gives out labels, notes which are the same channel and which cannot go."""

    def __init__(self) -> None:
        self.count = 0
        self._edges: list[np.ndarray] = []
        self._fixed: list[tuple[np.ndarray, str]] = []

    def fresh(self, n: int) -> Tensor:
        """Labels (n,) that nothing carries yet."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Entries at the same place, after broadcasting, are the same channel."""
        a, b = torch.broadcast_tensors(thin(a), thin(b))
        pairs = np.stack([a.reshape(-1).numpy(), b.reshape(-1).numpy()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.size:
            self._edges.append(np.unique(pairs, axis=1))

    def fuse(self, axis: Axis, dims: Sequence[int]) -> Axis:
        """Channels that differ only along `dims` can only go together; the labels then no longer vary there."""
        dims = [dim for dim in dims if dim in axis.varies]
        for dim in dims:
            self.unite(axis.labels, flat(axis.labels, (dim,)))
        return replace(axis, labels=flat(axis.labels, dims)) if dims else axis

    def fix(self, labels: Tensor, reason: str) -> None:
        """None of these channels can be removed."""
        self._fixed.append((np.unique(thin(labels).reshape(-1).numpy()), reason))

    def tie(self, axis: Axis, dims: Sequence[int], reason: str) -> Axis | None:
        """What an operation over `dims` leaves to choose: fused along them, or nothing at all, for that reason."""
        dims = [dim for dim in axis.varies if dim in dims]
        if not dims:
            return axis
        if set(dims) == set(axis.varies):
            self.fix(axis.labels, reason)
            return None
        return self.fuse(axis, dims)

    def meet(
        self, operands: Sequence[Value], zero: Callable[[tuple[bool, ...]], bool], where: str,
    ) -> tuple[Axis, ...]:  # fmt: skip
        """The axes of what is computed entry by entry from operands, which broadcast.

        zero    whether the result of a masked channel is zero, from whether each operand is
        where   for the reason of what is fixed
        """
        shape = torch.broadcast_shapes(*(value.shape for value in operands))
        found: list[_Meeting] = []
        for i, value in enumerate(operands):
            for axis in value.axes:
                axis = replace(axis, labels=_aligned(axis.labels, shape))
                met = [entry for entry in found if set(entry.axis.varies) & set(axis.varies)]
                for entry in met:
                    self._join(entry, axis, where)
                    entry.note(i, axis)
                if not met:
                    found.append(_Meeting(axis, {i: set(axis.varies)}, {i: axis.zero}))
        kept = []
        for entry in found:
            axis: Axis | None = entry.axis
            for i, value in enumerate(operands):
                extents = {len(shape) + dim for dim in value.extents}
                if axis is not None:
                    loose = (set(axis.varies) & extents) - entry.covered.get(i, set())
                    axis = self.tie(axis, sorted(loose), f"meets values of a fixed size {where}")
            if axis is not None and axis.varies:
                flags = tuple(entry.zeros.get(i, False) for i in range(len(operands)))
                kept.append(replace(axis, zero=zero(flags)))
        return tuple(kept)

    def _join(self, entry: _Meeting, axis: Axis, where: str) -> None:
        """Unites two overlapping axes; the entry keeps the one with more to choose from."""
        wide, narrow = entry.axis, axis
        if len(narrow.varies) > len(wide.varies):
            wide, narrow = narrow, wide
        common = narrow.varies
        if not set(common) <= set(wide.varies):
            self.fix(wide.labels, f"its units overlap in part with others {where}")
            self.fix(narrow.labels, f"its units overlap in part with others {where}")
        elif wide.varies == common or min(wide.varies) in common:
            self.unite(wide.labels, narrow.labels)
        else:  # an entry for each position inside of a head, the same for all heads: heads are the units
            self.fix(narrow.labels, f"is shared by all heads {where}")
            wide = self.fuse(wide, common)
        entry.axis = replace(wide, origin=wide.origin if wide.origin == narrow.origin else None)

    def classes(self) -> tuple[np.ndarray, dict[int, str]]:
        """The class of every label, by its smallest member, and the reason of each class that cannot go."""
        root = np.arange(self.count)
        edges = np.concatenate(self._edges, axis=1) if self._edges else np.zeros((2, 0), dtype=np.int64)
        while True:
            a, b = root[edges[0]], root[edges[1]]
            low = np.minimum(a, b)
            if (a == b).all():
                break
            np.minimum.at(root, a, low)
            np.minimum.at(root, b, low)
            while (root[root] != root).any():
                root = root[root]
        reasons: dict[int, str] = {}
        for labels, reason in self._fixed:
            for each in np.unique(root[labels]):
                if reasons.get(int(each), HIDDEN) == HIDDEN:
                    reasons[int(each)] = reason
        return root, reasons


@dataclass(eq=False)
class _Meeting:
    """An axis of a result, which dimensions of it each operand has an axis on, and whether that is zero."""

    axis: Axis
    covered: dict[int, set[int]]
    zeros: dict[int, bool]

    def note(self, operand: int, axis: Axis) -> None:
        self.covered[operand] = self.covered.get(operand, set()) | set(axis.varies)
        self.zeros[operand] = self.zeros.get(operand, False) or axis.zero


def _aligned(labels: Tensor, shape: torch.Size) -> Tensor:
    return (
        labels.expand(shape)
        if labels.dim() == len(shape)
        else labels[(None,) * (len(shape) - labels.dim())].expand(shape)
    )


class Following(Protocol):
    """What follows labels through a trace; `consumed` are dimensions of parameters that a sum runs over."""

    labels: Labels
    consumed: set[tuple[str, int]]
