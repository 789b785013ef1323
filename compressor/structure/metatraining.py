"""The training of a metanetwork: it learns, on networks alike, to rewrite one such that pruning costs it less.

Liu, Wang and Zhang, arXiv 2506.12041; what the metanetwork is, and how it is used, is in `passes/metaprune.py`. A step
is one network: rewritten, its cross-entropy in eval mode on some examples, and the pull that makes small channels
smaller; both gradients go back through the rewriting. The authors add up the loss over 100 batches beside a pull of 10;
here the loss is a mean, and the pull 0.1. After each round the networks that are kept back are rewritten, pruned and
measured on examples of their own, and the metanetwork of the round that loses least is the result: the authors choose
it on test data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from compressor.core.batch import Batch, Examples, call
from compressor.core.errors import DataError
from compressor.core.structure import Subject
from compressor.core.tensors import named_tensors
from compressor.core.training import Training
from compressor.graph.blocks import first_tensor
from compressor.learning.trainer import Fitting
from compressor.passes.metaprune import Metaprune, pull, rewrite, scores
from compressor.passes.parts.metanetwork import Metanetwork, Shape
from compressor.passes.parts.removing import Removing
from compressor.passes.settings.metaprune import MetapruneSettings
from compressor.structure.stage import GraphSurgeon, looked_at, measure_norms

BATCH = 256
"""Examples that run at once."""


@dataclass(frozen=True)
class MetaTraining:
    """How a metanetwork learns.

    rounds     over all networks that it learns from
    examples   of a step
    rate       AdamW's; a tenth of it after `fall` rounds
    strength   of the pull beside the mean loss of an example
    fraction   of the multiplications that are removed where it is judged
    """

    rounds: int = 20
    examples: int = 2048
    rate: float = 1e-3
    fall: int = 15
    strength: float = 0.1
    fraction: float = 0.5


class _Network:
    """A network of the population, whose graph is traced once; or a copy of one with other weights."""

    def __init__(self, module: nn.Module, example: Batch) -> None:
        self.module, self.surgeon = module, GraphSurgeon(example, call, still=True)
        self.graph, self.groups = self.surgeon.channels(module), self.surgeon.groups(module)


def metatrain(
    networks: Sequence[nn.Module], judges: Sequence[nn.Module], learned: Examples, judged: Examples,
    settings: MetaTraining, shape: Shape, seed: int, advance: Callable[[float, str], None],
) -> tuple[Metanetwork, list[dict[str, Any]]]:  # fmt: skip
    """A metanetwork, and what each round came to; round 0 is that without one.

    Args:
        networks: Trained, of convolutions; float32, in eval mode. They are not changed.
        judges: Of the same kind, kept back to choose the round by.
        learned, judged: Examples with labels, to learn from and to judge by.
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
    log = [{"round": 0} | _judgement(None, kept_back, judged, settings)]
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
        found = _judgement(metanetwork, kept_back, judged, settings)
        log.append({"round": number, "loss": round(total / len(pupils), 6)} | found)
        if found["pruned_loss"] < best:
            best, kept = found["pruned_loss"], copy.deepcopy(metanetwork.state_dict())
    metanetwork.load_state_dict(kept)
    return metanetwork.eval().requires_grad_(False), log


def pruned_once(
    module: nn.Module, examples: Examples, pruning: MetapruneSettings, seed: int, advance: Callable[[float, str], None]
) -> nn.Module:  # fmt: skip
    """A network of the population as the authors have them: a little pruned by norms, and trained on.

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
        outputs = first_tensor(_called(pupil.module, leaves, given.inputs))
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


def _called(module: nn.Module, changed: dict[str, Tensor], batch: Batch) -> Any:
    """The forward with other parameters."""
    positional = (batch[""],) if "" in batch else ()
    return functional_call(module, changed, positional, {name: value for name, value in batch.items() if name})


def _judgement(
    metanetwork: Metanetwork | None, judges: Sequence[_Network], judged: Examples, settings: MetaTraining
) -> dict[str, float]:  # fmt: skip
    """Loss and accuracy of the judges, rewritten, and again once pruned and their norms measured; means over them."""
    pruning = MetapruneSettings.model_validate({"fraction": settings.fraction, "step": 1.0})
    batches = [judged.part(part).inputs for part in torch.arange(len(judged)).split(BATCH)]
    rows = []
    for judge in judges:
        subject = looked_at(copy.deepcopy(judge.module), batches, judge.surgeon, lambda name: True)
        if metanetwork is not None:
            rewrite(metanetwork, subject)
        whole = _measured(subject, judged)
        removing = Removing(subject, subject.choosable(), pruning)
        removing.run(lambda subject=subject, removing=removing: scores(subject, removing.groups), 1.0)
        measure_norms(subject.module, batches)
        rows.append((*whole, *_measured(subject, judged)))
    names = ("whole_loss", "whole_accuracy", "pruned_loss", "pruned_accuracy")
    return {
        name: round(sum(values) / len(values), 6) for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }


@torch.no_grad()
def _measured(subject: Subject, examples: Examples) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    assert examples.labels is not None
    found = torch.cat([first_tensor(subject.call(batch)) for batch in subject.batches])
    right = (found.argmax(1) == examples.labels).double().mean()
    return float(functional.cross_entropy(found, examples.labels)), float(right)
