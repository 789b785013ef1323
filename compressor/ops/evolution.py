"""A search that learns: measure some networks of a family, predict all the others, measure next what looks best.

Sarah et al., "A hardware-aware framework for accelerating neural architecture search across modalities", arXiv
2202.12954, algorithm 1. Two values are to be small: the time that a network takes, and what it loses.

Where we leave it: equal networks are one, however their genes are written, and none is measured twice; what predicts is
chosen by what it makes of networks that it has not seen; of the time a prior may be known, which is fitted first; the
inner search starts from what was measured, and takes up again what it found; one network in five is drawn at random.
While nothing measured meets a target, how far it is missed comes before all else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compressor.ops.pareto import crowding, ranks
from compressor.ops.predictors import kendall, one_hot, ridge

Genes = tuple[int, ...]
Values = tuple[float, float]
"""The time that a network takes, and what it loses."""
ALPHAS = (0.03, 0.3, 3.0, 30.0)
"""Penalties of ridge, and of its kernel, that are tried."""
WIDTHS = (1.0, 3.0)
"""Of the kernel exp(−d / (w · genes)), in the squared distance d of two codes."""
FOLDS, FEWEST = 5, 8
"""Parts that networks are left out in, to choose what predicts; and how many tell anything."""
POPULATION, GENERATIONS = 40, 10
EXPLORED = 5
"""One of so many networks that are measured is drawn at random."""


@dataclass(frozen=True)
class Space:
    """The networks: a choice for each gene, the first of which is the smallest or fastest.

    counts    how many choices each gene has
    inactive  genes that make no difference, given the others
    prior     what is known of the time beforehand, in any unit
    trained   members that are worth a look before others, as they are
    """

    counts: tuple[int, ...]
    inactive: Callable[[Genes], Collection[int]] = lambda _: ()
    prior: Callable[[Genes], float] | None = None
    trained: tuple[Genes, ...] = ()

    def canonical(self, genes: Sequence[int]) -> Genes:
        """The same network with 0 for every gene that makes no difference."""
        found = tuple(int(gene) for gene in genes)
        idle = self.inactive(found)
        return tuple(0 if place in idle else gene for place, gene in enumerate(found))

    def code(self, genes: Genes) -> np.ndarray:
        """One-hot; nothing of what makes no difference."""
        return one_hot(genes, self.counts, self.inactive(genes))

    def draw(self, generator: np.random.Generator) -> Genes:
        """A member at random: every second time all of its genes lie near one level, which is drawn first."""
        counts = np.array(self.counts)
        shares = generator.random(len(counts))
        if generator.random() < 0.5:
            shares = np.clip(generator.random() + 0.3 * (shares - 0.5), 0, 1 - 1e-9)
        return self.canonical(np.floor(shares * counts).astype(int).tolist())

    @property
    def size(self) -> int:
        """Members at most."""
        return math.prod(self.counts)


@dataclass(frozen=True)
class Predictor:
    """Of one value: a line along the prior, where there is one, and what ridge or its kernel makes of the rest."""

    rest: Callable[[np.ndarray], np.ndarray]
    line: tuple[float, float] | None = None

    def __call__(self, codes: np.ndarray, priors: np.ndarray | None) -> np.ndarray:
        found = self.rest(codes)
        return found if self.line is None or priors is None else found + self.line[0] * priors + self.line[1]


def predictor(codes: np.ndarray, values: np.ndarray, priors: np.ndarray | None = None) -> Predictor:
    """What predicts values (n,) from codes (n, features): whichever errs least on parts that were left out."""
    line, left = None, values
    if priors is not None and len(values) > 2 and np.ptp(priors) > 0:
        slope, level = np.polyfit(priors, values, 1)
        line, left = (float(slope), float(level)), values - slope * priors - level
    methods = [_ridge(alpha) for alpha in ALPHAS]
    methods += [_kernel(alpha, width) for alpha in ALPHAS for width in WIDTHS]
    if len(values) < FEWEST:
        return Predictor(methods[1](codes, left), line)
    parts = [np.arange(len(values)) % FOLDS == part for part in range(FOLDS)]
    errors = [
        sum(float(np.abs(method(codes[~part], left[~part])(codes[part]) - left[part]).sum()) for part in parts)
        for method in methods
    ]
    return Predictor(methods[int(np.argmin(errors))](codes, left), line)


Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def _ridge(alpha: float) -> Fit:
    def fit(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        weights, bias = ridge(x, y, alpha)
        return lambda codes: codes @ weights + bias

    return fit


def _kernel(alpha: float, width: float) -> Fit:
    """Ridge on exp(−‖a − b‖² / (width · n)) of n genes that are on: (K + α/10·I)⁻¹(y − ȳ)."""

    def fit(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        scale, level = width * max(1.0, float(x.sum(1).mean())), float(y.mean())

        def near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
            return np.exp(-np.maximum(squares, 0) / scale)

        weights = np.linalg.solve(near(x, x) + 0.1 * alpha * np.eye(len(x)), y - level)
        return lambda codes: near(codes, x) @ weights + level

    return fit


@dataclass
class Search:
    """What was measured, and what to measure next.

    target   of the time; None where the whole front is wanted
    known    networks and their values
    foretold  of networks that were chosen by what was predicted: that, and what was then measured
    """

    space: Space
    seed: int = 0
    target: float | None = None
    known: dict[Genes, Values] = field(default_factory=dict)
    foretold: list[tuple[Values, Values]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._expected: dict[Genes, Values] = {}

    def tell(self, measured: Mapping[Genes, Values]) -> None:
        """Adds what was measured."""
        for genes, values in measured.items():
            if (expected := self._expected.pop(genes, None)) is not None:
                self.foretold.append((expected, values))
        self.known |= measured

    @property
    def tau(self) -> Values | None:
        """Kendall's τ of what was predicted and what was then measured, of both values; None of too few."""
        if len(self.foretold) < FEWEST:
            return None
        time, loss = (kendall(*zip(*((a[i], b[i]) for a, b in self.foretold), strict=True)) for i in (0, 1))
        return time, loss

    def first(self, n: int) -> list[Genes]:
        """Both ends of the space and its trained members, then others at random, until there are `n`."""
        ends = [0] * len(self.space.counts), [count - 1 for count in self.space.counts]
        found = dict.fromkeys(map(self.space.canonical, (*ends, *self.space.trained)))
        left = [genes for genes in found if genes not in self.known]
        return self._filled(left, max(n, len(left)))

    def ask(self, n: int) -> list[Genes]:
        """Members that nobody has measured: those that are predicted to be on the front of what is known and what is
        not, far from others on it, and some at random."""
        predicted = self._evolved(self._predictors())
        fresh = {genes: values for genes, values in predicted.items() if genes not in self.known}
        names = [*fresh, *self.front()]
        points = [self._sorted_by((self.known | fresh)[genes]) for genes in names]
        order, chosen = ranks(points), list[Genes]()
        for rank in range(max(order, default=-1) + 1):
            front = [at for at, found in enumerate(order) if found == rank]
            spread = crowding([points[at] for at in front])
            best = sorted(range(len(front)), key=lambda i: (-spread[i], names[front[i]]))
            chosen += [names[front[i]] for i in best if names[front[i]] in fresh]
        chosen = list(dict.fromkeys([*self._aimed(fresh, n // 2), *chosen]))[: n - n // EXPLORED]
        self._expected = {genes: fresh[genes] for genes in chosen}
        return self._filled(chosen, n)

    def front(self) -> list[Genes]:
        """Measured members that no other one is better than, the fastest first."""
        names = list(self.known)
        order = ranks([self.known[genes] for genes in names]) if names else []
        return sorted((names[i] for i, rank in enumerate(order) if rank == 0), key=lambda genes: self.known[genes])

    def best(self) -> Genes | None:
        """The measured member that loses least of those that meet the target; None where none does."""
        fitting = [g for g, values in self.known.items() if self.target is None or values[0] <= self.target]
        return min(fitting, key=lambda genes: self.known[genes][::-1], default=None)

    def _sorted_by(self, values: Values) -> tuple[float, ...]:
        """What the target misses first, while nothing measured meets it."""
        if self.target is not None and self.best() is None:
            return (max(0.0, values[0] - self.target), values[1])
        return values

    def _aimed(self, predicted: Mapping[Genes, Values], n: int) -> list[Genes]:
        """Of predicted members those that miss the target least, and of what meets it those that lose least."""
        if self.target is None:
            return []
        target = self.target
        return sorted(predicted, key=lambda genes: (max(0.0, predicted[genes][0] - target), predicted[genes][1]))[:n]

    def _filled(self, chosen: list[Genes], n: int) -> list[Genes]:
        """With members at random up to `n`, or as many as there are."""
        generator = np.random.default_rng([self.seed, len(self.known)])
        for _ in range(100 * n):
            if len(chosen) >= n:
                break
            drawn = self.space.draw(generator)
            if drawn not in self.known and drawn not in chosen:
                chosen.append(drawn)
        return chosen

    def _predictors(self) -> Callable[[Genes], Values]:
        names = list(self.known)
        codes = np.stack([self.space.code(genes) for genes in names])
        prior = self.space.prior
        priors = None if prior is None else np.array([prior(genes) for genes in names])
        values = np.array([self.known[genes] for genes in names])
        time, loss = predictor(codes, values[:, 0], priors), predictor(codes, values[:, 1])

        def predicted(genes: Genes) -> Values:
            code = self.space.code(genes)[None]
            given = None if prior is None else np.array([prior(genes)])
            return float(time(code, given)[0]), float(loss(code, None)[0])

        return predicted

    def _evolved(self, predicted: Callable[[Genes], Values]) -> dict[Genes, Values]:
        """All that NSGA-II came upon on predictions, from the measured front and random members on."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        counts, found = self.space.counts, dict[Genes, Values]()
        sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=self.seed + len(self.known))
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        names = [f"{place}" for place in range(len(counts))]
        choices: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.IntDistribution(0, count - 1) for name, count in zip(names, counts, strict=True)
        }
        generator = np.random.default_rng([self.seed, len(self.known), 1])
        start = [*self._near_target()[: POPULATION // 2]]
        start += [self.space.draw(generator) for _ in range(POPULATION - len(start))]
        for genes in start:
            study.enqueue_trial(dict(zip(names, genes, strict=True)))
        for _ in range(POPULATION * GENERATIONS):
            trial = study.ask(choices)
            genes = self.space.canonical([trial.params[name] for name in names])
            if genes not in found:
                found[genes] = predicted(genes)
            study.tell(trial, self._sorted_by(found[genes]))
        return found

    def _near_target(self) -> list[Genes]:
        """The measured front, what is nearest to the target first."""
        front = self.front()
        if self.target is None:
            return front
        target = self.target
        return sorted(front, key=lambda genes: abs(self.known[genes][0] - target))
