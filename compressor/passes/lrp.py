"""Pruning by explaining: units that carry the least relevance for what the network says are removed.

Yeom et al., "Pruning by explaining: a novel criterion for deep neural network pruning", Pattern Recognition 2021, arXiv
1912.08881; the composites after Hatefi et al., "Pruning by explaining revisited", arXiv 2408.12568. Taylor and
gradient, to compare with: Molchanov et al., "Pruning convolutional neural networks for resource efficient
inference", ICLR 2017.

Relevance starts as 1 at the class of each reference sample and is propagated to the input in one backward pass; the
score of a unit is the sum over samples and positions of |relevance| at its output. The lowest go, over the whole
network, and scores are computed anew after each step. Where several layers write one unit (a residual sum), theirs are
averaged.

We leave the papers in this: units are removed for good, with all that depends on them; the other criteria are made
comparable between groups by their Euclidean norm, as Molchanov et al. do; relevance in attention goes to the values
alone, the softmax counts as constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.core.errors import PassError
from compressor.core.groups import Group
from compressor.core.structure import Outcome, Subject
from compressor.core.structure_settings import LrpSettings
from compressor.ops.attribution import Composite, Rule, attribute
from compressor.ops.relevance import RULES
from compressor.ops.selection import lowest_reaching

Gone = dict[Group, Tensor]
"""Group -> BoolTensor (units,) of those that are removed."""


def relevance(weight: Tensor, inputs: Tensor, relevance: Tensor, rule: str, **options: float | Tensor) -> Tensor:
    """The relevance of a linear layer's inputs, (n, in), from that of its outputs, (n, out), without its bias.

    Args:
        weight: (out, in).
        inputs: (n, in).
        rule: epsilon (epsilon=) | zplus | alpha_beta (alpha=, beta=) | gamma (gamma=) | zbox (low=, high=).
    """
    return RULES[rule](lambda x, w: x @ w.T, lambda w, s: s @ w, inputs, weight, relevance, **options)


class Lrp(LrpSettings):
    """The lowest units, step by step; see the module."""

    def restructure(self, subject: Subject) -> Outcome:
        """The network without the units that explain least."""
        groups = subject.choosable()
        gone = {group: torch.zeros(group.size, dtype=torch.bool) for group in groups}
        n_steps = math.ceil(self.fraction / self.step - 1e-9)
        for number in range(n_steps):
            goal = min(self.fraction, (number + 1) * self.step)
            scores = self.scores(subject, groups)
            for group, flags in zip(groups, self._lowest(subject, scores, gone, goal), strict=True):
                subject.surgeon.mask(subject.module, group, (flags & ~gone[group]).nonzero()[:, 0])
                gone[group] = flags
            subject.advance(1 / n_steps, f"{self._share(subject, gone):.0%} removed")
        if self._share(subject, gone) < self.fraction - 1e-9:
            raise PassError(
                f"lrp: only {self._share(subject, gone):.1%} of the {self.of} can go with most: {self.most:g}, and "
                f"fraction is {self.fraction:g}; write a smaller fraction, or let more of each group go"
            )
        removal = {group: flags.nonzero()[:, 0] for group, flags in gone.items() if flags.any()}
        kept = {group.name: [int((~flags).sum()), group.size] for group, flags in gone.items()}
        return Outcome(subject.surgeon.remove(subject.module, removal), {"kept_units": kept})

    def scores(self, subject: Subject, groups: Sequence[Group]) -> list[Tensor]:
        """(units,) per group; infinite where no layer that was seen makes the unit."""
        if self.criterion == "magnitude":
            tensors = {name: p.detach().square() for name, p in subject.module.named_parameters()}
            found = [_gathered(group, {name: t for name, t in tensors.items() if t.dim() > 1}) for group in groups]
        else:
            names = {id(parameter): name for name, parameter in subject.module.named_parameters()}
            layers = attribute(names, subject.call, subject.batches, subject.labels, self.composite())
            found = [_gathered(group, layers) for group in groups]
        if self.criterion == "lrp":
            return found
        return [_of_unit_length(values) for values in found]

    def composite(self) -> Composite:
        """Which rule for which layer."""
        options = {
            "epsilon": {"epsilon": self.epsilon}, "gamma": {"gamma": self.gamma}, "zplus": {},
            "alpha_beta": {"alpha": self.alpha, "beta": self.beta},
        }  # fmt: skip
        conv, linear = (Rule(name, options[name]) for name in (self.conv_rule, self.linear_rule))
        return Composite(self.criterion, conv, linear, self.first_rule == "zbox")

    def _lowest(self, subject: Subject, scores: list[Tensor], gone: Gone, goal: float) -> list[Tensor]:
        """What is gone, and as few of the lowest as reach the goal."""
        groups = list(gone)
        least = [group.size - max(0, min(int(self.most * group.size), group.size - 1)) for group in groups]

        def share(flags: list[Tensor]) -> float:
            return self._share(subject, dict(zip(groups, flags, strict=True)))

        return lowest_reaching(scores, list(gone.values()), least, 1, goal, share)

    def _share(self, subject: Subject, gone: Gone) -> float:
        """Of the parameters or of the units, those that are gone."""
        if self.of == "units":
            return sum(int(flags.sum()) for flags in gone.values()) / max(1, sum(group.size for group in gone))
        removal = {group: flags.nonzero()[:, 0] for group, flags in gone.items() if flags.any()}
        before = subject.surgeon.parameters(subject.module, {})
        return 1 - subject.surgeon.parameters(subject.module, removal) / before


def _gathered(group: Group, layers: dict[str, Tensor]) -> Tensor:
    """A group's scores: its entries' summed in each tensor, averaged over the tensors that have scores.

    Args:
        layers: Scores along a layer's outputs (out,) by the name of its weight, or per weight, of the weight's shape.
    """
    found = []
    for member in group.producers:
        values = layers.get(member.tensor)
        if values is not None:
            along = values if values.dim() == 1 else values.movedim(member.dim, 0).flatten(1).sum(1)
            found.append(along[member.index].double().sum(1))
    return torch.stack(found).mean(0) if found else torch.full((group.size,), math.inf, dtype=torch.float64)


def _of_unit_length(values: Tensor) -> Tensor:
    norm = values.norm()
    return values / norm if 0 < float(norm) < math.inf else values
