"""Which units go: the lowest by score over all groups, as few as reach a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def lowest(scores: Sequence[Tensor], allowed: Sequence[int]) -> list[tuple[int, int]]:
    """(group, unit) by ascending score over all groups, of each at most so many; equal ones in their order.

    A score of infinity is never taken.
    """
    found: list[tuple[float, int, int]] = []
    for number, (values, n) in enumerate(zip(scores, allowed, strict=True)):
        order = values.argsort(stable=True)[:n].tolist()
        found += [(float(values[unit]), number, unit) for unit in order if math.isfinite(float(values[unit]))]
    return [(number, unit) for _, number, unit in sorted(found)]


def lowest_reaching(
    scores: Sequence[Tensor], gone: Sequence[Tensor], least: Sequence[int], divisible: int, goal: float,
    amount: Callable[[list[Tensor]], float],
) -> list[Tensor]:  # fmt: skip
    """The fewest of the lowest units that, beside what is gone, bring `amount` to `goal`; all that may, if none do.

    Args:
        scores, gone: (units,) per group; gone are BoolTensors, and stay so.
        least: How many units of each group have to stay.
        divisible: What stays of a group that loses units is a multiple of it; the highest of those that would go stay.
        amount: What goes with these units, in the unit of `goal`; more for more units.

    Returns:
        BoolTensors like `gone`, of all that goes.
    """
    ahead = [values.masked_fill(flags, math.inf) for values, flags in zip(scores, gone, strict=True)]
    allowed = [max(0, len(flags) - n - int(flags.sum())) for flags, n in zip(gone, least, strict=True)]
    ranking = lowest(ahead, allowed)
    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high) // 2
        enough = amount(_together(ranking[:middle], gone, divisible)) >= goal - 1e-9
        low, high = (low, middle) if enough else (middle + 1, high)
    return _together(ranking[:low], gone, divisible)


def _together(units: Sequence[tuple[int, int]], gone: Sequence[Tensor], divisible: int) -> list[Tensor]:
    """`gone` and these units, given lowest first, but for those that `divisible` keeps."""
    chosen: list[list[int]] = [[] for _ in gone]
    for number, unit in units:
        chosen[number].append(unit)
    found = []
    for flags, numbers in zip(gone, chosen, strict=True):
        open_units = len(flags) - int(flags.sum())
        kept = math.ceil((open_units - len(numbers)) / divisible) * divisible
        flags = flags.clone()
        flags[torch.tensor(numbers[: max(0, open_units - kept)], dtype=torch.long)] = True
        found.append(flags)
    return found
