"""Which units go: the lowest by score over all groups, as few as reach a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHARES = 10_000
"""Steps of a share, in which `even_share` looks for the smallest."""


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


def even_share(
    scores: Sequence[Tensor], gone: Sequence[Tensor], least: Sequence[int], kinds: Sequence[object], goal: float,
    amount: Callable[[list[Tensor]], float],
) -> list[Tensor]:  # fmt: skip
    """The same share of every kind of unit, its lowest: the smallest share that brings `amount` to `goal`.

    Args:
        scores, gone, least, goal, amount: As of `lowest_reaching`.
        kinds: Groups of one kind are ranked together; a kind of its own for each group makes all lose alike.

    Returns:
        BoolTensors like `gone`, of all that goes; what may, if that is not enough.
    """
    members: dict[object, list[int]] = {}
    for number, kind in enumerate(kinds):
        members.setdefault(kind, []).append(number)
    rankings = []
    for numbers in members.values():
        values = [scores[number].masked_fill(gone[number], math.inf) for number in numbers]
        allowed = [max(0, len(gone[i]) - least[i] - int(gone[i].sum())) for i in numbers]
        rankings.append([(numbers[place], unit) for place, unit in lowest(values, allowed)])

    def at(share: int) -> list[Tensor]:
        found = [flags.clone() for flags in gone]
        for numbers, ranking in zip(members.values(), rankings, strict=True):
            size, already = sum(len(gone[i]) for i in numbers), sum(int(gone[i].sum()) for i in numbers)
            for number, unit in ranking[: max(0, math.floor(share / SHARES * size + 0.5) - already)]:
                found[number][unit] = True
        return found

    low, high = 0, SHARES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if amount(at(middle)) >= goal - 1e-9 else (middle + 1, high)
    return at(low)


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
