"""What makes units of a network go to zero while it trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from compressor.core.errors import RecipeError
from compressor.core.follower import Follower
from compressor.core.groups import Group
from compressor.core.structure import Outcome
from compressor.ops.selection import lowest_reaching
from compressor.passes.parts.units import Units

if TYPE_CHECKING:
    from compressor.core.structure import Removal, Subject
    from compressor.passes.settings.training import TrainingSettings


class Sparsifier(Follower):
    """Follows a training from its step 0 to `n_steps` − 1 and sets units to zero for good.

    gone       BoolTensor (units,) per group: zero, and kept there
    start      the first step at which units may go
    length     steps over which they go
    budget     what goes in all: parameters, units or multiplications
    """

    remembers: ClassVar[tuple[str, ...]] = ("gone",)

    def __init__(self, settings: TrainingSettings, subject: Subject, n_steps: int) -> None:
        self.settings, self.subject = settings, subject
        self.units = Units(subject.module, self.choosable())
        self.gone = [torch.zeros(group.size, dtype=torch.bool) for group in self.units.groups]
        self.least = [
            min(group.size, max(settings.divisible, group.size - int(settings.most * group.size)))
            for group in self.units.groups
        ]
        self.start, self.length = settings.schedule_of(n_steps)
        whole = self.units.n if settings.of == "units" else subject.whole(settings.of)
        self.budget = round(settings.fraction * whole)
        self._refuse_unreachable(whole)

    @abstractmethod
    def step(self, number: int, before: Mapping[str, Tensor], rate: float) -> None:
        """After the optimizer's step; `before` are the units' tensors before it, `rate` its learning rate."""

    def choosable(self) -> Sequence[Group]:
        """What may go, of which some units may."""
        return self.subject.choosable()

    def limits(self) -> str:
        """What keeps some of it from going."""
        return f"divisible: {self.settings.divisible} and most: {self.settings.most:g}"

    def before(self) -> Mapping[str, Tensor]:
        return self.units.snapshot()

    def entry(self) -> dict[str, float]:
        return {"sparsity": round(self.sparsity(), 6), "parameters": self.parameters()}

    def note(self) -> str:
        megabytes = 4e-6 * self.parameters()
        return f"{self.sparsity():.0%} of units gone · {megabytes:.2f} MB in float32"

    def amount(self, flags: list[Tensor]) -> int:
        """Parameters, units or multiplications that go with these."""
        return self.subject.amount(self.removal(flags), self.settings.of)

    def lowest(self, scores: list[Tensor], goal: float) -> list[Tensor]:
        """The fewest of the lowest units that bring what goes to `goal`, with those that are gone."""
        return lowest_reaching(scores, self.gone, self.least, self.settings.divisible, goal, self.amount)

    def removal(self, flags: list[Tensor]) -> Removal:
        """The units of these flags by group."""
        pairs = zip(self.units.groups, flags, strict=True)
        return {group: each.nonzero()[:, 0] for group, each in pairs if bool(each.any())}

    def freeze(self) -> None:
        """Sets to zero what is gone: the optimizer has moved it."""
        self.units.scale([(~flags).float() for flags in self.gone])

    def sparsity(self) -> float:
        """The share of the units that is gone."""
        return sum(int(flags.sum()) for flags in self.gone) / max(1, self.units.n)

    def parameters(self) -> int:
        """How many the network will have without what is gone."""
        return self.subject.surgeon.parameters(self.subject.module, self.removal(self.gone))

    def outcome(self, log: list[dict[str, float]], **report: Any) -> Outcome:
        """The network without what is gone."""
        kept = {
            group.name: [group.size - int(flags.sum()), group.size]
            for group, flags in zip(self.units.groups, self.gone, strict=True)
        }
        smaller = self.subject.surgeon.remove(self.subject.module, self.removal(self.gone))
        return Outcome(smaller, {"training": log, "kept_units": kept} | report)

    def _refuse_unreachable(self, whole: int) -> None:
        """Before anything is trained.

        Raises:
            RecipeError: Not so much can go.
        """
        scores = [torch.zeros(group.size) for group in self.units.groups]
        most = self.amount(self.lowest(scores, float("inf")))
        if most < self.budget:
            settings = self.settings
            raise RecipeError(
                f"{settings.name}: fraction {settings.fraction:g} of the {settings.of} cannot go; "
                f"{most / whole:.3f} can, with {self.limits()}; "
                "write a smaller fraction"
            )
