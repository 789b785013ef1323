"""Units that go for good, step by step: the lowest by scores that are taken anew after each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from compressor.core.errors import RecipeError
from compressor.core.groups import Group
from compressor.core.structure import Removal, Subject
from compressor.ops.selection import even_share, lowest_reaching


class Removes(Protocol):
    """What the settings say of it: `fraction` of the parameters, units or flops, at most `most` of a group's units."""

    @property
    def name(self) -> str: ...
    @property
    def fraction(self) -> float: ...
    @property
    def of(self) -> Literal["parameters", "units", "flops"]: ...
    @property
    def step(self) -> float: ...
    @property
    def most(self) -> float: ...
    @property
    def divisible(self) -> int: ...


def removable(groups: Sequence[Group], settings: Removes) -> list[int]:
    """How many units of each group may go: one stays at least, or as many as have to be a multiple."""
    return [max(0, min(int(settings.most * group.size), group.size - settings.divisible)) for group in groups]


class Removing:
    """What has gone of a subject's groups.

    groups   those that can lose units
    gone     BoolTensor (units,) of each
    allowed  how many units of each may go
    kinds    of each group, where every kind loses the same share; none: the lowest of all groups go

    Raises:
        RecipeError: Not so much can go.
    """

    def __init__(
        self, subject: Subject, groups: Sequence[Group], settings: Removes, kinds: Sequence[object] | None = None
    ) -> None:  # fmt: skip
        self.subject, self.groups, self.settings, self.kinds = subject, list(groups), settings, kinds
        self.gone = [torch.zeros(group.size, dtype=torch.bool) for group in groups]
        self.allowed = removable(groups, settings)
        self.whole = sum(group.size for group in groups) if settings.of == "units" else subject.whole(settings.of)
        self._refuse_unreachable(self.share(self.lowest([torch.zeros(group.size) for group in groups], math.inf)))

    def run(self, scores: Callable[[], list[Tensor]], part: float) -> None:
        """Masks units of the subject's network until the fraction is gone.

        Args:
            scores: (units,) per group, of the network as it is.
            part: Of the pass's whole work, for progress.
        """
        fraction, step = self.settings.fraction, self.settings.step
        n_steps = math.ceil(fraction / step - 1e-9)
        for number in range(n_steps):
            taken = self.lowest(scores(), min(fraction, (number + 1) * step))
            for group, flags, gone in zip(self.groups, taken, self.gone, strict=True):
                self.subject.surgeon.mask(self.subject.module, group, (flags & ~gone).nonzero()[:, 0])
            self.gone = taken
            self.subject.advance(part / n_steps, f"{self.share(taken):.0%} removed")
        self._refuse_unreachable(self.share(self.gone))

    def lowest(self, scores: Sequence[Tensor], goal: float) -> list[Tensor]:
        """What is gone, and as few of the lowest as bring the share to `goal`."""
        least = [group.size - n for group, n in zip(self.groups, self.allowed, strict=True)]
        if self.kinds is None:
            return lowest_reaching(scores, self.gone, least, self.settings.divisible, goal, self.share)
        return even_share(scores, self.gone, least, self.kinds, goal, self.share)

    def share(self, flags: Sequence[Tensor]) -> float:
        """Of the parameters, units or multiplications, those that go with these."""
        return self.subject.amount(self._removal(flags), self.settings.of) / max(1, self.whole)

    def removal(self) -> Removal:
        """The units that are gone."""
        return self._removal(self.gone)

    def kept(self) -> dict[str, list[int]]:
        """Name of a group -> how many of its units stay, and how many there were."""
        return {
            group.name: [int((~flags).sum()), group.size] for group, flags in zip(self.groups, self.gone, strict=True)
        }

    def _removal(self, flags: Sequence[Tensor]) -> Removal:
        pairs = zip(self.groups, flags, strict=True)
        return {group: each.nonzero()[:, 0] for group, each in pairs if bool(each.any())}

    def _refuse_unreachable(self, share: float) -> None:
        settings = self.settings
        if share < settings.fraction - 1e-9:
            raise RecipeError(
                f"{settings.name}: only {share:.1%} of the {settings.of} can go with most: {settings.most:g}, and "
                f"fraction is {settings.fraction:g}; write a smaller fraction, or let more of each group go"
            )
