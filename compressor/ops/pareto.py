"""Fronts of points of which every coordinate is to be small: ranks, crowding, and the volume that they dominate.

Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on Evolutionary
Computation 2002, https://doi.org/10.1109/4235.996017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ranks(points: Sequence[Point]) -> list[int]:
    """0 for what nothing dominates, 1 for what nothing but those dominates, and so on; equal points rank alike."""
    if not points:
        return []
    rows = np.asarray(points, np.float64)
    over: np.ndarray = np.all(rows[:, None] <= rows, -1) & np.any(rows[:, None] < rows, -1)
    found, rank = np.full(len(rows), -1), 0
    while (found < 0).any():
        left = found < 0
        found[left & ~over[left].any(0)] = rank
        rank += 1
    return found.tolist()


def crowding(points: Sequence[Point]) -> list[float]:
    """Σ over coordinates of the distance between a point's two neighbours, as a share of the whole span; infinite at
    the ends. Of points of one rank; a coordinate that all share adds nothing."""
    found = [0.0] * len(points)
    for axis in range(len(points[0]) if points else 0):
        order = sorted(range(len(points)), key=lambda i: points[i][axis])
        low, high = points[order[0]][axis], points[order[-1]][axis]
        found[order[0]] = found[order[-1]] = math.inf
        if high == low:
            continue
        for before, at, after in zip(order, order[1:], order[2:], strict=False):
            found[at] += (points[after][axis] - points[before][axis]) / (high - low)
    return found


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume between the points and `reference` that at least one of them dominates, exactly.

    By slices along the last coordinate, each of which is the same question with one coordinate less.
    """
    inside = [point for point in points if all(x < y for x, y in zip(point, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - min(point[0] for point in inside))
    levels = sorted({point[-1] for point in inside})
    total = 0.0
    for low, high in zip(levels, [*levels[1:], reference[-1]], strict=True):
        slice_ = [point[:-1] for point in inside if point[-1] <= low]
        total += (high - low) * hypervolume(slice_, reference[:-1])
    return total
