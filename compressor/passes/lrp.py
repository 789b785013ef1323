"""Pruning by explaining: units that carry the least relevance for what the network says are removed.

Yeom et al., "Pruning by explaining: a novel criterion for deep neural network pruning", Pattern Recognition 2021, arXiv
1912.08881; the composites after Hatefi et al., "Pruning by explaining revisited", arXiv 2408.12568. Taylor and
gradient, to compare with: Molchanov et al., "Pruning convolutional neural networks for resource efficient
inference", ICLR 2017.

Relevance starts as 1 at the class of each reference sample and is propagated to the input in one backward pass; the
score of a unit is the sum over samples and positions of |relevance| at its output. The lowest go, over the whole
network, and scores are computed anew after each step. Where several layers write one unit (a residual sum), theirs are
averaged.

`trials` searches the rules as Hatefi et al. do: one each for the low, middle and high third of the convolutions and for
linear layers, such that the area under the accuracy is largest when units go at once, in the order of their scores.

We leave the papers in this: units are removed for good, with all that depends on them; the other criteria are made
comparable between groups by their Euclidean norm, as Molchanov et al. do; relevance in attention goes to the values
alone, the softmax counts as constant.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from compressor.core.contract import StructurePass
from compressor.core.groups import Group
from compressor.core.roles import folded
from compressor.core.structure import Outcome, Subject
from compressor.ops.attribution import Composite, Rule, attribute, first_output
from compressor.ops.relevance import RULES
from compressor.ops.selection import lowest
from compressor.passes.parts.removing import Removing, removable
from compressor.passes.parts.units import unit_scores
from compressor.passes.settings.lrp import LrpSettings
from compressor.passes.settings.lrp import Rule as RuleName

SHARES = torch.arange(0.05, 0.96, 0.1).tolist()
"""Of the units, that are gone when a composite is judged."""
THIRDS = ("low", "middle", "high")


def relevance(weight: Tensor, inputs: Tensor, relevance: Tensor, rule: str, **options: float | Tensor) -> Tensor:
    """The relevance of a linear layer's inputs, (n, in), from that of its outputs, (n, out), without its bias.

    Args:
        weight: (out, in).
        inputs: (n, in).
        rule: epsilon (epsilon=) | zplus | alpha_beta (alpha=, beta=) | gamma (gamma=) | zbox (low=, high=).
    """
    return RULES[rule](lambda x, w: x @ w.T, lambda w, s: s @ w, inputs, weight, relevance, **options)


class Lrp(LrpSettings, StructurePass):
    """The lowest units, step by step; see the module."""

    def examine(self, subject: Subject) -> tuple[str, ...]:
        self._removing(subject)
        return ()

    def restructure(self, subject: Subject) -> Outcome:
        """The network without the units that explain least."""
        original = copy.deepcopy(subject.module) if self.compensate == "bias" else None
        removing = self._removing(subject)
        groups, composite, searched = removing.groups, self.composite(), {}
        if self.trials:
            composite, searched = self._searched(subject)
        work = (0.5 if self.epochs else 1.0) * (0.5 if self.trials else 1.0)
        removing.run(lambda: self.scores(subject, groups, composite), work)
        removal = removing.removal()
        smaller = subject.surgeon.remove(subject.module, removal)
        report: dict[str, Any] = {"kept_units": removing.kept()} | searched
        if original is not None:
            report["new_biases"] = len(subject.surgeon.compensate(smaller, original, removal, subject.batches))
        if self.epochs:
            report["training"] = subject.trainer(self, other=smaller, share=0.5).train()
        return Outcome(smaller, report)

    def _removing(self, subject: Subject) -> Removing:
        """Nothing is gone yet; it raises where not so much can go."""
        groups = subject.choosable()
        return Removing(subject, groups, self, self._kinds(groups))

    def _kinds(self, groups: Sequence[Group]) -> list[object] | None:
        """Of which each loses the same share."""
        if self.spread == "network":
            return None
        return [folded(group.name) if self.spread == "kind" else number for number, group in enumerate(groups)]

    def scores(self, subject: Subject, groups: Sequence[Group], composite: Composite) -> list[Tensor]:
        """(units,) per group; infinite where no layer that was seen makes the unit."""
        if self.criterion == "magnitude":
            tensors = {name: p.detach().square() for name, p in subject.module.named_parameters()}
            found = [unit_scores(group, {name: t for name, t in tensors.items() if t.dim() > 1}) for group in groups]
        else:
            names = {id(parameter): name for name, parameter in subject.module.named_parameters()}
            layers = attribute(names, subject.call, subject.batches, subject.labels, composite)
            found = [unit_scores(group, layers) for group in groups]
        if self.criterion == "lrp":
            return found
        return [_of_unit_length(values) for values in found]

    def composite(self) -> Composite:
        """Which rule for which layer, as written."""
        conv, linear = self._rule(self.conv_rule), self._rule(self.linear_rule)
        return Composite(self.criterion, conv, linear, self.first_rule == "zbox")

    def _rule(self, name: str) -> Rule:
        options = {
            "epsilon": {"epsilon": self.epsilon}, "gamma": {"gamma": self.gamma}, "zplus": {},
            "alpha_beta": {"alpha": self.alpha, "beta": self.beta},
        }  # fmt: skip
        return Rule(name, options[name])

    def _searched(self, subject: Subject) -> tuple[Composite, dict[str, Any]]:
        """The composite that keeps most, and what the report says of the search. The rules as written come first."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        places, groups = self._thirds(subject), subject.choosable()
        with torch.no_grad():
            wanted = [first_output(subject.call(batch)) for batch in subject.batches]
        written = {place: self.linear_rule if place == "linear" else self.conv_rule for place in places.values()}

        def composite(rules: dict[str, str]) -> Composite:
            own = {name: self._rule(rules[place]) for name, place in places.items()}
            return dataclasses.replace(self.composite(), own=own)

        def area(trial: Any) -> float:
            rules = {place: trial.suggest_categorical(place, list(get_args(RuleName))) for place in written}
            found = self._area(subject, groups, composite(rules), wanted)
            subject.advance((0.25 if self.epochs else 0.5) / self.trials, f"{found:.0%} of the predictions")
            return found

        seed = int(torch.randint(2**31, (1,), generator=subject.generator))
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        study.enqueue_trial(written)
        study.optimize(area, n_trials=self.trials)
        searched = {"rules": study.best_params, "area": study.best_value, "area_as_written": study.trials[0].value}
        return composite(study.best_params), {"search": searched}

    def _thirds(self, subject: Subject) -> dict[str, str]:
        """Name of a layer's weight -> where it stands: a third of the convolutions, in their order, or linear."""
        names = {id(parameter): name for name, parameter in subject.module.named_parameters()}
        order = list(attribute(names, subject.call, subject.batches[:1], None, self.composite()))
        dims = {name: parameter.dim() for name, parameter in subject.module.named_parameters()}
        convolutions = [name for name in order if dims[name] > 2]
        found = {name: THIRDS[3 * n // len(convolutions)] for n, name in enumerate(convolutions)}
        return found | {name: "linear" for name in order if dims[name] == 2}

    @torch.no_grad()
    def _area(
        self, subject: Subject, groups: Sequence[Group], composite: Composite, wanted: list[Tensor]
    ) -> float:  # fmt: skip
        """The mean over SHARES of what the network keeps of its predictions, units masked at once by their scores."""
        scores = self.scores(subject, groups, composite)
        ranking = lowest(scores, removable(groups, self))
        masked = dataclasses.replace(subject, module=copy.deepcopy(subject.module))
        done, kept = 0, []
        for share in SHARES:
            units: dict[int, list[int]] = {}
            for number, unit in ranking[done : round(share * len(ranking))]:
                units.setdefault(number, []).append(unit)
            done = round(share * len(ranking))
            for number, numbers in units.items():
                subject.surgeon.mask(masked.module, groups[number], torch.tensor(numbers))
            outputs = (first_output(masked.call(batch)) for batch in subject.batches)
            kept.append(sum(map(_kept, outputs, wanted, subject.labels or wanted)) / len(wanted))
        return sum(kept) / len(kept)


def _kept(output: Tensor, original: Tensor, labels: Tensor) -> float:
    """The share of samples with the right class, the label where there is one; of hidden states the cosine."""
    if output.dim() == 2:
        right = original.argmax(1) if labels is original else labels
        return float((output.argmax(1) == right).double().mean())
    return float(torch.cosine_similarity(output.flatten(1), original.flatten(1)).mean())


def _of_unit_length(values: Tensor) -> Tensor:
    norm = values.norm()
    return values / norm if 0 < float(norm) < math.inf else values
