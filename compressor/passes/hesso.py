"""HESSO: one training, on the way of which the least salient units shrink to zero; CRIC, which looks before it cuts.

Chen et al., "HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning", arXiv
2409.09085. x is the vector of a unit (all entries that make a channel, head or neuron, as OTOv3's zero-invariant
groups, arXiv 2312.09411), d the direction that the optimizer moves it in.

After the warm-up the budget is split over periods. At the start of each, the lowest units by saliency are taken; every
step, after the optimizer's, they shrink by a factor that brings them to zero just before the period's end, where they
stay. CRIC comes before the first period: the lowest units are shrunk on trial while the saliency of all units is added
up, then everything is brought back; units that fell below them on the way are tried next, until there are none.

We leave the reference in this: the last unit of a period is chosen by saliency, where the reference cuts the list by
index. d points where the step goes, as "direction" says, so that a unit that the training makes grow counts as
important; the reference gives the saliency what the step *subtracts*. What CRIC has chosen goes over the periods,
lowest first, and its trials do not add the loss to the saliency.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from compressor.core.contract import StructurePass
from compressor.core.errors import RecipeError
from compressor.core.structure import Outcome, Subject
from compressor.ops.selection import lowest
from compressor.passes.parts.sparsifier import Sparsifier
from compressor.passes.settings.hesso import HessoSettings

WEIGHT = 0.2
"""Of each of the five criteria."""


def saliency(x: Tensor, direction: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Σ_k 0.2·s_k/‖s_k‖₂ over all groups, s = ‖x‖, ‖x‖/size, cos(x, d) + 1, |xᵀd|, ½(xᵀd)².

    Args:
        x, direction: (groups, size).
        sizes: (groups,) entries that count, where rows are filled up with zeros; all of a row otherwise.

    Returns:
        (groups,) float64. Where x or d is zero the cosine is; a criterion that is zero for all groups adds nothing.
    """
    x, direction = x.double(), direction.double()
    if sizes is None:
        sizes = torch.full((len(x),), x.shape[1])
    return _saliency(x.norm(dim=1), direction.norm(dim=1), (x * direction).sum(1), sizes)


def _saliency(size: Tensor, direction_size: Tensor, product: Tensor, entries: Tensor) -> Tensor:
    """The same from ‖x‖, ‖d‖, xᵀd and the number of entries, each (groups,)."""
    lengths = size * direction_size
    cosine = torch.where(lengths > 0, product / lengths.clamp_min(1e-300), 0.0)
    criteria = torch.stack([size, size / entries, cosine + 1, product.abs(), product.square() / 2])
    norms = criteria.norm(dim=1, keepdim=True)
    return (WEIGHT * torch.where(norms > 0, criteria / norms.clamp_min(1e-300), 0.0)).sum(0)


def shrink_factors(steps: int) -> Tensor:
    """(D − t − 1)/(D − t), t = 1 … D − 1: a period's factors of D steps, whose product falls in a line to exactly 0.

    A period of one step has the one factor 0.
    """
    t = torch.arange(1, max(2, steps), dtype=torch.float64)
    return ((steps - t - 1) / (steps - t).clamp_min(1)).clamp_min(0)


def split_budget(total: int, periods: int) -> list[int]:
    """`total` over so many periods in equal parts, the remainder in the last."""
    return [total // periods] * (periods - 1) + [total - total // periods * (periods - 1)]


class Hesso(HessoSettings, StructurePass):
    """One training, and the network without what went; see the module."""

    def examine(self, subject: Subject) -> tuple[str, ...]:
        Shrinking(self, subject, 1)
        return ()

    def restructure(self, subject: Subject) -> Outcome:
        """The smaller network, trained."""
        trainer = subject.trainer(self)
        if reason := self.refuses_steps(trainer.n_steps):
            raise RecipeError(f"{self.name}: {reason}")
        shrinking = Shrinking(self, subject, trainer.n_steps)
        return shrinking.outcome(trainer.train(shrinking), cycles=shrinking.cycle)


class Shrinking(Sparsifier):
    """HESSO's schedule.

    began      the step at which the periods begin; None while CRIC may still go on
    chosen     what is gone at the end of this period
    cycle      of CRIC, how many are done
    total      (units,) the saliency added up over CRIC's `sampled` steps
    n_lowest   units that the budget takes, as the first cycle has it
    violating, tried, next   what this cycle shrinks, what earlier ones did, what the coming one will
    saved      the network before CRIC
    """

    remembers = (*Sparsifier.remembers, "began", "chosen", "cycle", "total", "sampled", "n_lowest", "violating",
                 "tried", "next", "saved")  # fmt: skip
    settings: HessoSettings

    def __init__(self, settings: HessoSettings, subject: Subject, n_steps: int) -> None:
        super().__init__(settings, subject, n_steps)
        self.began = None if settings.cycles else self.start
        none = [torch.zeros_like(flags) for flags in self.gone]
        self.chosen, self.violating, self.tried, self.next = none, none, none, none
        self.cycle, self.sampled, self.n_lowest = 0, 0, 0
        self.total = torch.zeros(self.units.n, dtype=torch.float64)
        self.saved: dict[str, Tensor] = {}
        self.period = self.length // settings.periods
        self.goals = list(accumulate(split_budget(self.budget, settings.periods)))

    def step(self, number: int, before: Mapping[str, Tensor], rate: float) -> None:
        if number < self.start:
            return
        if self.began is None:
            self._try(number - self.start, before)
        elif number - self.began < self.period * self.settings.periods:
            self._shrink(number - self.began, before)
        else:
            self.freeze()

    def saliencies(self, before: Mapping[str, Tensor]) -> Tensor:
        """(units,) of all groups, from their tensors before the optimizer's step and now."""
        found: list[list[Tensor]] = []
        now = self.units.vectors(self.units.tensors)
        for x, after, size in zip(self.units.vectors(before), now, self.units.sizes, strict=True):
            x, d = x.double(), after.double() - x.double()
            found.append([x.norm(dim=1), d.norm(dim=1), (x * d).sum(1), torch.full((len(x),), size)])
        return _saliency(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _shrink(self, step: int, before: Mapping[str, Tensor]) -> None:
        """Step `step` of all periods."""
        period, t = divmod(step, self.period)
        if t == 0:
            scores = self.total / self.sampled if self.sampled else self.saliencies(before)
            self.chosen = self.lowest(self.units.split(scores), self.goals[period])
        factors = shrink_factors(self.period)
        self._scale(self.chosen, float(factors[t]) if t < len(factors) else 0.0)
        if t == self.period - 1:
            self.gone = self.chosen

    def _scale(self, shrinking: list[Tensor], factor: float) -> None:
        """What shrinks by a factor, what is gone to zero."""
        self.units.scale(
            [
                torch.where(flags, factor, 1.0).masked_fill(gone, 0.0)
                for flags, gone in zip(shrinking, self.gone, strict=True)
            ]
        )

    def _try(self, step: int, before: Mapping[str, Tensor]) -> None:
        """Step `step` of CRIC."""
        scores = self.saliencies(before)
        self.total, self.sampled = self.total + scores, self.sampled + 1
        if step == 0:
            self.saved = {name: tensor.clone() for name, tensor in self.subject.module.state_dict().items()}
            self.violating = self.lowest(self.units.split(scores), self.budget)
            self.n_lowest = sum(int(flags.sum()) for flags in self.violating)
        self.next = [
            now & ~violating & ~tried | waiting
            for now, violating, tried, waiting in zip(
                self._as_low(scores), self.violating, self.tried, self.next, strict=True
            )
        ]
        factors = shrink_factors(self.settings.cycle_steps)
        t = step % self.settings.cycle_steps
        self._scale(self.violating, float(factors[t]) if t < len(factors) else 0.0)
        if t == self.settings.cycle_steps - 1:
            self._end_cycle(step)

    def _as_low(self, scores: Tensor) -> list[Tensor]:
        """As many of the lowest as the first cycle shrinks."""
        found = [torch.zeros_like(flags) for flags in self.gone]
        allowed = [group.size - least for group, least in zip(self.units.groups, self.least, strict=True)]
        for number, unit in lowest(self.units.split(scores), allowed)[: self.n_lowest]:
            found[number][unit] = True
        return found

    def _end_cycle(self, step: int) -> None:
        """Brings everything back; the periods begin where nothing is left to try."""
        self.tried = [tried | violating for tried, violating in zip(self.tried, self.violating, strict=True)]
        self.violating, self.next = self.next, [torch.zeros_like(flags) for flags in self.gone]
        self.subject.module.load_state_dict(self.saved)
        self.cycle += 1
        if self.cycle == self.settings.cycles or not any(bool(flags.any()) for flags in self.violating):
            self.began, self.saved = self.start + step + 1, {}
