"""The multiple-choice knapsack: one option per item, the least total cost within a budget of bytes.

A dynamic programme over bytes in units of `resolution`: best[b] = min over options o of best'[b − size_o] + cost_o.
Sizes are rounded up to whole units, so that a choice never exceeds its budget, and at a resolution of 1 it is exact.
One run answers every budget up to the largest. (Pisinger, "A minimal algorithm for the multiple-choice knapsack
problem", European Journal of Operational Research 83, 1995.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Frontier:
    """The least cost within each budget, and the options that have it.

    base        bytes of all items at their smallest
    resolution  bytes of a unit
    costs       (n_units + 1,): the least cost within base + i units, never rising
    """

    base: int
    resolution: int
    costs: np.ndarray
    _units: tuple[np.ndarray, ...]
    _options: tuple[np.ndarray, ...]

    def within(self, budget: float) -> list[int]:
        """The option of each item that cost least within `budget` bytes.

        Raises:
            ValueError: Not even the smallest options fit.
        """
        if budget < self.base:
            raise ValueError(f"budget of {budget:.0f} bytes: the smallest options take {self.base}")
        return self._choice(int(min((budget - self.base) // self.resolution, len(self.costs) - 1)))

    def smallest(self, cost: float) -> list[int] | None:
        """The options of the smallest budget whose cost is at most `cost`; None where there is none."""
        fits = np.flatnonzero(self.costs <= cost)
        return self._choice(int(fits[0])) if len(fits) else None

    def _choice(self, left: int) -> list[int]:
        chosen = []
        for units, options in zip(reversed(self._units), reversed(self._options), strict=True):
            option = int(options[left])
            left -= int(units[option])
            chosen.append(option)
        return chosen[::-1]


def frontier(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int, resolution: int = 1
) -> Frontier:
    """The least costs of one option per item for every budget up to `budget` bytes.

    Args:
        sizes, costs: Per item, of its options; an item has at least one. Ties go to the first option.
    """
    base = sum(min(item) for item in sizes)
    n_units = max(0, int(budget) - base) // resolution
    best = np.zeros(n_units + 1)
    every_units, every_option = [], []
    for item, prices in zip(sizes, costs, strict=True):
        units = -(-(np.asarray(item, np.int64) - min(item)) // resolution)
        found, chosen = np.full(n_units + 1, np.inf), np.zeros(n_units + 1, np.uint8)
        for option, (size, price) in enumerate(zip(units, prices, strict=True)):
            if size > n_units:
                continue
            total = best[: n_units + 1 - size] + price
            better = total < found[size:]
            found[size:][better] = total[better]
            chosen[size:][better] = option
        best = found
        every_units.append(units)
        every_option.append(chosen)
    return Frontier(base, resolution, best, tuple(every_units), tuple(every_option))
