"""Meta-pruning: a metanetwork rewrites the network slightly, then the channels of the smallest norms go.

Liu, Wang and Zhang, "Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning",
arXiv 2506.12041; written from a description of its code. The pruner is that of Fang et al., "DepGraph", CVPR 2023,
arXiv 2301.12900: channels that depend on one another go together.

The graph of channels goes through the metanetwork once; weights, γ, β and biases are read back. Some epochs of training
follow, then channels go by the norms of all that they are made of and read by, a few at a time over the whole network,
until the goal; then the rest of the training. The metanetwork has learned on other networks (`learning/metatraining`)
to write such that this costs little: `pull` is the gradient that makes small channels smaller meanwhile.

We leave the paper in the families: networks of convolutions alone, no transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.channels import ChannelGraph
from compressor.core.contract import StructurePass
from compressor.core.groups import Group, Member
from compressor.core.structure import Outcome, Subject
from compressor.core.tensors import named_tensors
from compressor.passes.parts.metanetwork import Metanetwork, load_metanetwork
from compressor.passes.parts.removing import Removing
from compressor.passes.settings.metaprune import MetapruneSettings

BASE = 16.0
"""α: how many times as strongly the smallest channel of a group is pulled as the largest."""


def _counted(group: Group, tensors: Mapping[str, Tensor]) -> list[Member]:
    """The members that are parameters and no biases."""
    return [each for each in group.members if each.tensor in tensors and not each.tensor.endswith("bias")]


def importance(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """(units,) float64: Σw² of a unit in each tensor, the mean over tensors, over the largest unit's.

    Args:
        tensors: Parameters of the network by name; biases do not count.
    """
    found = []
    for member in _counted(group, tensors):
        squares = tensors[member.tensor].detach().double().square().movedim(member.dim, 0)
        along = squares.reshape(len(squares), -1).sum(1)
        found.append(along[member.index].sum(1))
    mean = torch.stack(found).mean(0)
    return mean / mean.max().clamp_min(1e-300)


def pulls(importance: Tensor) -> Tensor:
    """γ = α^((max s − s)/(max s − min s)), s = √importance: (units,); 1 where all are equal."""
    s = importance.sqrt()
    span = s.max() - s.min()
    return BASE ** ((s.max() - s) / span) if float(span) > 0 else torch.ones_like(s)


def pull(groups: Sequence[Group], tensors: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """strength · γ · w of every channel, to be added to the gradients: by name, of those tensors that count.

    Args:
        tensors: Parameters of the network by name.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        gammas = pulls(importance(group, tensors)).float()
        for member in _counted(group, tensors):
            weight = tensors[member.tensor].detach()
            along = torch.zeros(weight.shape[member.dim])
            along[member.index] = strength * gammas.unsqueeze(1)
            added = along.view(-1, *[1] * (weight.dim() - 1 - member.dim)) * weight
            found[member.tensor] = found[member.tensor] + added if member.tensor in found else added
    return found


class Metaprune(MetapruneSettings, StructurePass):
    """The smaller network, trained; see the module."""

    def examine(self, subject: Subject) -> tuple[str, ...]:
        Removing(subject, subject.choosable(), self)
        if self.network is None:
            return ()
        metanetwork, graph = self._metanetwork(self.network, subject)
        title = type(subject.module).__name__
        note = f"metaprune: {self.network} was trained on other architectures than that of {title}"
        return () if metanetwork.knows(graph) else (note,)

    def _metanetwork(self, network: str, subject: Subject) -> tuple[Metanetwork, ChannelGraph]:
        """It, and the graph of the subject's network, which is of its family."""
        metanetwork, graph = load_metanetwork(Path(network)), subject.surgeon.channels(subject.module)
        metanetwork.refuse(graph, type(subject.module).__name__)
        return metanetwork, graph

    def restructure(self, subject: Subject) -> Outcome:
        """The network with fewer channels."""
        report: dict[str, Any] = {}
        original = copy.deepcopy(subject.module) if self.epochs_before else None
        if self.network is not None:
            metanetwork, graph = self._metanetwork(self.network, subject)
            report["other_architecture"] = not metanetwork.knows(graph)
            report["changed"] = rewrite(metanetwork, graph, subject.module)
        removing = Removing(subject, subject.choosable(), self)
        total = self.epochs_before + self.epochs
        if self.epochs_before:
            before = self.model_copy(update={"epochs": self.epochs_before, "rate": self.rate_before})
            trainer = subject.trainer(before, teacher=original, name="before", share=self.epochs_before / total)
            report["training_before"] = trainer.train()
        removing.run(lambda: scores(subject, removing.groups), 0.0 if total else 1.0)
        smaller = subject.surgeon.remove(subject.module, removing.removal())
        report["kept_units"] = removing.kept()
        if self.epochs:
            report["training"] = subject.trainer(self, other=smaller, share=self.epochs / total).train()
        return Outcome(smaller, report)


@torch.no_grad()
def rewrite(metanetwork: Metanetwork, graph: ChannelGraph, module: nn.Module) -> float:
    """Gives a module of this graph the metanetwork's weights, in place; by how much of their norm they changed."""
    tensors = named_tensors(module)
    found = metanetwork.rewritten(graph, tensors)
    old = torch.stack([tensors[name].double().square().sum() for name in found]).sum().sqrt()
    moved = torch.stack([(tensors[name].double() - new.double()).square().sum() for name, new in found.items()]).sum()
    for name, values in found.items():
        tensors[name].copy_(values)
    return round(float(moved.sqrt() / old.clamp_min(1e-300)), 6)


def scores(subject: Subject, groups: Sequence[Group]) -> list[Tensor]:
    """The importance of every unit, (units,) per group."""
    tensors = dict(subject.module.named_parameters())
    return [importance(group, tensors) for group in groups]
