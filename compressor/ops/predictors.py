"""Predictors of what a network of a family will come to, from the choices that make it: in closed form, from few
measured ones.

Sarah et al., "A hardware-aware framework for accelerating neural architecture search across modalities", arXiv
2202.12954. Where we leave it: a choice that has no effect, as of a block that is left out, is nothing in the one-hot
code, so that equal networks have one code.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np


def one_hot(choices: Sequence[int], counts: Sequence[int], inactive: Collection[int] = ()) -> np.ndarray:
    """float64 (Σ counts,): 1 at each choice among its count of possibilities; of `inactive` choices all are 0.

    Raises:
        ValueError: A choice is none of its possibilities.
    """
    parts = []
    for place, (choice, count) in enumerate(zip(choices, counts, strict=True)):
        if not 0 <= choice < count:
            raise ValueError(f"choice {place} is {choice}; expected 0 to {count - 1}")
        part = np.zeros(count)
        if place not in inactive:
            part[choice] = 1.0
        parts.append(part)
    return np.concatenate(parts) if parts else np.zeros(0)


def ridge(x: np.ndarray, y: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """(weights, bias) that minimise ‖y − x·w − b‖² + α‖w‖²; the bias is not penalised.

    Args:
        x: (n, features), or (n,) of a single one.
        y: (n,).
    """
    rows = np.asarray(x, np.float64)
    rows, wanted = rows.reshape(len(rows), -1), np.asarray(y, np.float64)
    middle, level = rows.mean(0), float(wanted.mean())
    centred = rows - middle
    gram = centred.T @ centred + alpha * np.eye(rows.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (wanted - level))
    return weights, level - float(middle @ weights)


def label_scale(y: Sequence[float] | np.ndarray) -> float:
    """10^(⌊log₁₀ max⌋ − 1), by which the authors divide what is predicted; 1 where nothing is positive."""
    largest = float(np.max(np.asarray(y, np.float64), initial=0.0))
    return 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0


def kendall(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """τ_b: how far two rankings agree, from −1 to 1; pairs that are tied in one count for neither. 0 where either is
    all ties."""
    x, y = (np.sign(np.subtract.outer(each, each)) for each in (np.asarray(a, float), np.asarray(b, float)))
    upper = np.triu_indices(len(x), 1)
    x, y = x[upper], y[upper]
    untied = float(np.abs(x).sum()), float(np.abs(y).sum())
    return float((x * y).sum()) / math.sqrt(untied[0] * untied[1]) if all(untied) else 0.0


def latency(table: Mapping[Hashable, float], choices: Sequence[Hashable], base: float) -> float:
    """What a network takes: `base`, and what the `table` says that each of its operators takes, one key for each.

    Raises:
        ValueError: An operator was not measured.
    """
    unknown = [choice for choice in choices if choice not in table]
    if unknown:
        raise ValueError(f"the table has no {unknown[0]!r}; measure it first")
    return base + sum(table[choice] for choice in choices)
