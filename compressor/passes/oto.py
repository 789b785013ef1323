"""OTO: one training in which redundant units are penalised, and projected to zero where a step would turn them away.

DHSPG, the dual half-space projected gradient of Chen et al., "OTOv2: Automatic, Generic, User-Friendly", ICLR 2023,
arXiv 2303.06862, as OTOv3 trains with, arXiv 2312.09411. x is the vector of a unit (a zero-invariant group), g the
direction that the optimizer subtracts, per unit of the learning rate: the gradient with plain SGD.

After the warm-up the most redundant units are taken, once. Each step they are moved by −rate·λ·x/‖x‖ beside the
optimizer's step, λ such that the unit shrinks although the gradient lets it grow, and set to zero where the result has
left the half-space x̂ᵀx ≥ ε‖x‖². What is zero stays zero. What the penalty has not brought to zero at the end of the
pruning steps is set to zero then, and the report says how many those were.

We leave the papers in `most`: no group loses more than that share. Both halves of the redundancy depend on how wide a
layer is, and one choice for good can take a whole residual stream, with it all that the network knows.

With `erase` the units are whole branches, as OTOv3's H2SPG has them: what lies between two joins of the traced graph.
The most redundant are taken one by one, each only if everything that stays is still fed. The rest is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor.core.contract import StructurePass
from compressor.core.errors import CheckpointError
from compressor.core.groups import Operator
from compressor.core.structure import Outcome, Subject
from compressor.ops.selection import lowest
from compressor.passes.parts.sparsifier import Sparsifier
from compressor.passes.settings.oto import OtoSettings

_TINY = 1e-30


def redundancy(x: list[Tensor], gradient: list[Tensor]) -> Tensor:
    """½·norm(cos(−x, −g)) + ½·norm(1/(‖x‖/size + 1e-6)), norm(s) = s/‖s‖₂ over all units.

    Args:
        x, gradient: (units, size) of each group.

    Returns:
        (units of all groups,) float64.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(x, gradient, strict=True)]
    cosine = torch.cat([(a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(_TINY) for a, b in pairs])
    inverse = torch.cat([1 / (a.norm(dim=1) / a.shape[1] + 1e-6) for a, _ in pairs])
    return sum((0.5 * each / each.norm().clamp_min(_TINY) for each in (cosine, inverse)), torch.zeros(()))


def dhspg_penalty_range(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """λ_min = −xᵀg/‖x‖ and λ_max = −‖g‖²·‖x‖/xᵀg: between them both ‖x‖ and the loss fall (to first order).

    Args:
        x, gradient: (…, size).

    Returns:
        (…) each; 0 and infinity where xᵀg ≥ 0, since there any λ does.
    """
    product, size = (x * gradient).sum(-1), x.norm(dim=-1)
    grows = product < 0
    smallest = torch.where(grows, -product / size.clamp_min(_TINY), 0.0)
    divisor = torch.where(grows, product, -1.0)
    largest = torch.where(grows, -gradient.square().sum(-1) * size / divisor, torch.inf)
    return smallest, largest


def penalty(x: Tensor, gradient: Tensor, usual: float, amplification: float, cap: float) -> Tensor:
    """λ of each unit, (…): λ₀; clip(amplification·λ_min, λ₀, cap·λ₀) where xᵀg < 0, the midpoint from λ_max on."""
    smallest, largest = dhspg_penalty_range(x, gradient)
    raised = (amplification * smallest).clamp(usual, cap * usual)
    raised = torch.where(raised >= largest, (smallest + largest) / 2, raised)
    return torch.where(torch.isfinite(largest), raised, usual)


def half_space_project(x: Tensor, x_trial: Tensor, epsilon: float | Tensor) -> Tensor:
    """0 where x̂ᵀx < ε‖x‖², x̂ elsewhere: (…, size)."""
    leaves = (x_trial * x).sum(-1) < epsilon * x.square().sum(-1)
    return torch.where(leaves.unsqueeze(-1), torch.zeros((), dtype=x_trial.dtype), x_trial)


class Oto(OtoSettings, StructurePass):
    """One training, and the network without what went; see the module."""

    def examine(self, subject: Subject) -> tuple[str, ...]:
        self._projecting(subject, 1)
        return ()

    def restructure(self, subject: Subject) -> Outcome:
        """The smaller network, trained."""
        trainer = subject.trainer(self)
        projecting = self._projecting(subject, trainer.n_steps)
        return projecting.outcome(trainer.train(projecting), set_to_zero_at_the_end=projecting.forced)

    def _projecting(self, subject: Subject, n_steps: int) -> Projecting:
        """Of what a training of so many steps does; it raises where not so much can go."""
        return (Erasing if self.erase else Projecting)(self, subject, n_steps)


class Projecting(Sparsifier):
    """DHSPG's schedule.

    redundant   BoolTensor (units,) per group: what goes
    forced      how many of them the penalty did not bring to zero
    """

    remembers = (*Sparsifier.remembers, "redundant", "forced")
    settings: OtoSettings

    def __init__(self, settings: OtoSettings, subject: Subject, n_steps: int) -> None:
        super().__init__(settings, subject, n_steps)
        self.redundant, self.forced = [torch.zeros_like(flags) for flags in self.gone], 0

    def step(self, number: int, before: Mapping[str, Tensor], rate: float) -> None:
        if number == self.start:
            x, now = self.units.vectors(before), self.units.vectors(self.units.tensors)
            found = redundancy(x, [a - b for a, b in zip(x, now, strict=True)])
            self.redundant = self.lowest(self.units.split(-found), self.budget)
        if self.start <= number < self.start + self.length:
            self._project(before, rate)
        if number == self.start + self.length - 1:
            left = [flags & ~gone for flags, gone in zip(self.redundant, self.gone, strict=True)]
            self.forced, self.gone = sum(int(flags.sum()) for flags in left), self.redundant
        self.freeze()

    def _project(self, before: Mapping[str, Tensor], rate: float) -> None:
        """The penalised half-space step of the redundant units."""
        gone = []
        pairs = zip(self.units.vectors(before), self.units.vectors(self.units.tensors), strict=True)
        for number, (x, now) in enumerate(pairs):
            due = self.redundant[number] & ~self.gone[number]
            old, moved = x[due], now[due]
            pull = penalty(old, (old - moved) / rate, *self.settings.strength).unsqueeze(1)
            trial = moved - rate * pull * old / old.norm(dim=1, keepdim=True).clamp_min(_TINY)
            now[due] = half_space_project(old, trial, self.settings.epsilon)
            self.units.write(number, now)
            gone.append(self.gone[number] | (due & (now == 0).all(1)))
        self.gone = gone


class Erasing(Projecting):
    """The same of whole branches (H2SPG): the hierarchy of the graph says which of them may go together."""

    def choosable(self) -> Sequence[Operator]:
        """The branches.

        Raises:
            CheckpointError: There are none.
        """
        self.branches = self.subject.erasable()
        if not self.branches.operators:
            raise CheckpointError(
                f"{type(self.subject.module).__name__}: oto can erase nothing of it: no branch with weights of its own "
                "ends in a sum only; write erase: false for channels, or select other tensors"
            )
        return self.branches.operators

    def limits(self) -> str:
        return f"every sum fed by one of its inputs ({len(self.branches.operators)} branches)"

    def lowest(self, scores: list[Tensor], goal: float) -> list[Tensor]:
        """The lowest branches, one by one, until what goes is `goal`; those without which something starves stay."""
        taken: list[Operator] = []
        found = [torch.zeros_like(flags) for flags in self.gone]
        for number, _ in lowest(scores, [1] * len(scores)):
            if self.amount(found) >= goal:
                break
            operator = self.branches.operators[number]
            if self.branches.connected([*taken, operator]):
                taken.append(operator)
                found[number] = torch.ones_like(found[number])
        return found
