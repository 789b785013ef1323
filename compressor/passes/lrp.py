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

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.core.errors import RecipeError
from compressor.core.groups import Group
from compressor.core.roles import folded
from compressor.core.structure import Outcome, Subject
from compressor.core.structure_settings import LrpSettings
from compressor.ops.attribution import Composite, Rule, attribute
from compressor.ops.relevance import RULES
from compressor.ops.selection import even_share, lowest_reaching

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
        original = copy.deepcopy(subject.module) if self.compensate == "bias" else None
        gone = self._chosen(subject)
        removal = _removal(gone)
        smaller = subject.surgeon.remove(subject.module, removal)
        kept = {group.name: [int((~flags).sum()), group.size] for group, flags in gone.items()}
        report: dict[str, Any] = {"kept_units": kept}
        if original is not None:
            report["new_biases"] = len(subject.surgeon.compensate(smaller, original, removal, subject.batches))
        if self.epochs:
            report["training"] = subject.trainer(self, other=smaller).train()
        return Outcome(smaller, report)

    def _chosen(self, subject: Subject) -> Gone:
        """What goes, step by step; the subject's network ends with it masked."""
        groups = subject.choosable()
        gone = {group: torch.zeros(group.size, dtype=torch.bool) for group in groups}
        most = self._lowest(subject, [torch.zeros(group.size) for group in groups], gone, math.inf)
        self._refuse_unreachable(self._share(subject, dict(zip(groups, most, strict=True))))
        n_steps, part = math.ceil(self.fraction / self.step - 1e-9), 0.5 if self.epochs else 1.0
        for number in range(n_steps):
            goal = min(self.fraction, (number + 1) * self.step)
            scores = self.scores(subject, groups)
            for group, flags in zip(groups, self._lowest(subject, scores, gone, goal), strict=True):
                subject.surgeon.mask(subject.module, group, (flags & ~gone[group]).nonzero()[:, 0])
                gone[group] = flags
            subject.advance(part / n_steps, f"{self._share(subject, gone):.0%} removed")
        self._refuse_unreachable(self._share(subject, gone))
        return gone

    def _refuse_unreachable(self, share: float) -> None:
        if share < self.fraction - 1e-9:
            raise RecipeError(
                f"lrp: only {share:.1%} of the {self.of} can go with most: {self.most:g}, and fraction is "
                f"{self.fraction:g}; write a smaller fraction, or let more of each group go"
            )

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

        already = list(gone.values())
        if self.spread == "network":
            return lowest_reaching(scores, already, least, 1, goal, share)
        kinds = [folded(group.name) if self.spread == "kind" else number for number, group in enumerate(groups)]
        return even_share(scores, already, least, kinds, goal, share)

    def _share(self, subject: Subject, gone: Gone) -> float:
        """Of the parameters, units or multiplications, those that are gone."""
        whole = sum(group.size for group in gone) if self.of == "units" else subject.whole(self.of)
        return subject.amount(_removal(gone), self.of) / max(1, whole)


def _removal(gone: Gone) -> dict[Group, Tensor]:
    return {group: flags.nonzero()[:, 0] for group, flags in gone.items() if flags.any()}


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
