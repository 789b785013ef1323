"""Sums of xxᵀ, of which only the lower half is computed: the products are most of what error feedback costs."""

from __future__ import annotations

from torch import Tensor

_PANEL = 192
"""Columns of a panel: narrower ones leave out more, wider ones multiply faster; about a third is saved."""


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Adds rowsᵀ·rows, of rows (n, in), to `total` (in, in) on and below its diagonal; not all of it above."""
    for begin in range(0, rows.shape[1], _PANEL):
        end = min(begin + _PANEL, rows.shape[1])
        total[begin:end, :end].addmm_(rows[:, begin:end].T, rows[:, :end])


def mirror(total: Tensor) -> Tensor:
    """`total` (in, in) with what lies below its diagonal above it too; in place."""
    for begin in range(0, len(total), _PANEL):
        end = min(begin + _PANEL, len(total))
        total[:begin, begin:end] = total[begin:end, :begin].T
    return total


def damped(moment: Tensor, damping: float) -> Tensor:
    """A second moment (in, in) with damping·mean of its diagonal added to that."""
    found = moment.clone()
    found.diagonal().add_(damping * moment.diagonal().mean().clamp_min(1e-30))
    return found
