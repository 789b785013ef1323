"""The training of a metanetwork: it learns, on networks alike, to rewrite one such that pruning costs it less.

Liu, Wang and Zhang, arXiv 2506.12041; what the metanetwork is, and how it is used, is in `passes/metaprune.py`. A step
is one network: rewritten, its cross-entropy in eval mode on some examples, and the pull that makes small channels
smaller; both gradients go back through the rewriting. The authors add up the loss over 100 batches beside a pull of 10;
here the loss is a mean, and the pull 0.1. Every few rounds networks that are kept back are rewritten, pruned with a
short training before and after, and measured on examples of their own; the metanetwork of the round that loses least is
the result. The authors choose it on test data. What is pruned and not trained tells nothing about that (measured).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from compressor.core.batch import Batch, Examples, arguments, call
from compressor.core.errors import DataError
from compressor.core.structure import Subject
from compressor.core.tensors import named_tensors
from compressor.core.training import Training
from compressor.graph.blocks import first_tensor
from compressor.learning.trainer import Fitting
from compressor.passes.metaprune import Metaprune, pull, rewrite
from compressor.passes.parts.metanetwork import Metanetwork, Shape
from compressor.passes.settings.metaprune import MetapruneSettings
from compressor.structure.stage import GraphSurgeon

BATCH = 256
"""Examples that run at once."""


@dataclass(frozen=True)
class MetaTraining:
    """How a metanetwork learns.

    rounds     over all networks that it learns from
    examples   of a step
    rate       AdamW's; a tenth of it after `fall` rounds
    strength   of the pull beside the mean loss of an example
    every      so many rounds it is judged
    """

    rounds: int = 20
    examples: int = 2048
    rate: float = 1e-3
    fall: int = 15
    strength: float = 0.1
    every: int = 4


class _Network:
    """A network of the population, whose graph is traced once."""

    def __init__(self, module: nn.Module, example: Batch) -> None:
        self.module, surgeon = module, GraphSurgeon(example, call)
        self.graph, self.groups = surgeon.channels(module), surgeon.groups(module)


def metatrain(
    networks: Sequence[nn.Module], judges: Sequence[nn.Module], learned: Examples, judged: Examples,
    settings: MetaTraining, pruning: MetapruneSettings, shape: Shape, seed: int,
    advance: Callable[[float, str], None],
) -> tuple[Metanetwork, list[dict[str, Any]]]:  # fmt: skip
    """A metanetwork, and what rounds came to; round 0 is that without one.

    Args:
        networks: Trained, of convolutions; float32, in eval mode. They are not changed.
        judges: Of the same kind, kept back to choose the round by.
        learned, judged: Examples with labels, to learn from and to judge by.
        pruning: How judges are pruned and trained, without a metanetwork.
        shape: Its kernel is made as large as the networks' largest, and `adds` as they are.
        advance: Reports a share of all, and how it goes.

    Raises:
        CheckpointError: A network has no graph of channels, or they are of two families.
        DataError: There are no labels, or no networks.
    """
    if learned.labels is None or judged.labels is None:
        raise DataError("a metanetwork learns from labels, and the data has none; give data with labels")
    if not networks or not judges:
        raise DataError(f"a metanetwork learns from networks and is judged on others; found {len(networks)} and "
                        f"{len(judges)}; give two at least")  # fmt: skip
    example = judged.part(torch.arange(2)).inputs
    pupils, kept_back = ([_Network(module, example) for module in modules] for modules in (networks, judges))
    height, breadth = (max(sizes) for sizes in zip(*(pupil.graph.window for pupil in pupils), strict=True))
    shape = Shape(shape.layers, shape.width, shape.share, height, breadth, pupils[0].graph.adds)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metanetwork = Metanetwork(shape, tuple(sorted({pupil.graph.fingerprint() for pupil in pupils})))
    for network in (*pupils, *kept_back):
        metanetwork.refuse(network.graph, type(network.module).__name__)
    optimizer = torch.optim.AdamW(metanetwork.parameters(), lr=settings.rate)
    log: list[dict[str, Any]] = [{"round": 0} | _judgement(None, kept_back, learned, judged, pruning, seed)]
    best, kept = float("inf"), copy.deepcopy(metanetwork.state_dict())
    for number in range(1, settings.rounds + 1):
        if number == settings.fall + 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate / 10
        total = 0.0
        for place in torch.randperm(len(pupils), generator=generator).tolist():
            index = torch.randperm(len(learned), generator=generator)[: settings.examples]
            total += _step(metanetwork, pupils[place], learned.part(index), optimizer, settings.strength)
            advance(1 / settings.rounds / len(pupils), f"round {number} · loss {total / (len(pupils)):.4f}")
        log.append({"round": number, "loss": round(total / len(pupils), 6)})
        if number % settings.every and number != settings.rounds:
            continue
        found = _judgement(metanetwork, kept_back, learned, judged, pruning, seed)
        log[-1] |= found
        if found["pruned_loss"] < best:
            best, kept = found["pruned_loss"], copy.deepcopy(metanetwork.state_dict())
    metanetwork.load_state_dict(kept)
    return metanetwork.eval().requires_grad_(False), log


def pruned_once(
    module: nn.Module, examples: Examples, pruning: MetapruneSettings, seed: int, advance: Callable[[float, str], None]
) -> nn.Module:  # fmt: skip
    """A network, pruned by norms and trained; a little, it is one of the population as the authors have them.

    Args:
        module: Trained; float32. It is changed on the way.
        examples: With labels, to train on.
        pruning: Without a metanetwork.
    """
    inputs = examples.part(torch.arange(min(BATCH, len(examples)))).inputs

    def trainer(
        settings: Training, teacher: nn.Module | None = None, other: nn.Module | None = None, *,
        name: str = "", share: float = 1.0,
    ) -> Fitting:  # fmt: skip
        return Fitting(other or module, examples, settings, seed, None, lambda part, note: advance(share * part, note))

    surgeon, generator = GraphSurgeon({name: each[:2] for name, each in inputs.items()}, call), torch.Generator()
    subject = Subject(module, [inputs], None, surgeon, generator, lambda name: True, lambda *_: None, trainer)
    return Metaprune(**pruning.model_dump()).restructure(subject).module


def _step(
    metanetwork: Metanetwork, pupil: _Network, examples: Examples, optimizer: torch.optim.Optimizer, strength: float
) -> float:  # fmt: skip
    """One step on one network; its mean cross-entropy, rewritten."""
    tensors = named_tensors(pupil.module)
    rewritten = metanetwork.rewritten(pupil.graph, tensors)
    leaves = {name: values.detach().requires_grad_(True) for name, values in rewritten.items()}
    total = 0.0
    for part in torch.arange(len(examples)).split(BATCH):
        given = examples.part(part)
        outputs = first_tensor(functional_call(pupil.module, leaves, *arguments(given.inputs)))
        assert given.labels is not None
        loss = functional.cross_entropy(outputs, given.labels, reduction="sum") / len(examples)
        loss.backward()
        total += float(loss.detach())
    with torch.no_grad():
        parameters = {name: leaves.get(name, parameter) for name, parameter in pupil.module.named_parameters()}
        added = pull(pupil.groups, parameters, strength)
        gradients = [
            (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad) + added.get(name, 0.0)
            for name, leaf in leaves.items()
        ]
    optimizer.zero_grad()
    torch.autograd.backward(list(rewritten.values()), gradients)
    optimizer.step()
    return total


def _judgement(
    metanetwork: Metanetwork | None, judges: Sequence[_Network], learned: Examples, judged: Examples,
    pruning: MetapruneSettings, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Loss and accuracy of the judges, rewritten, and once they are pruned and trained; means over them."""
    rows = []
    for judge in judges:
        module = copy.deepcopy(judge.module)
        if metanetwork is not None:
            rewrite(metanetwork, judge.graph, module)
        whole = _measured(module, judged)
        rows.append((*whole, *_measured(pruned_once(module, learned, pruning, seed, lambda *_: None), judged)))
    names = ("whole_loss", "whole_accuracy", "pruned_loss", "pruned_accuracy")
    means = (round(sum(values) / len(values), 6) for values in zip(*rows, strict=True))
    return dict(zip(names, means, strict=True))


@torch.no_grad()
def _measured(module: nn.Module, examples: Examples) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    assert examples.labels is not None
    parts = torch.arange(len(examples)).split(BATCH)
    found = torch.cat([first_tensor(call(module, examples.part(part).inputs)) for part in parts])
    right = (found.argmax(1) == examples.labels).double().mean()
    return float(functional.cross_entropy(found, examples.labels)), float(right)
