"""The learning stage: the whole network, as encoded, is distilled on the original's predictions.

The original runs block by block first, over as many tokens at a time as the calibration has, and leaves only its head
inputs, in files. The student computes in bfloat16 where the processor multiplies that in hardware; of its weights only
those of one block, and the tables, are there at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.core.batch import Batch
from compressor.core.errors import CheckpointError
from compressor.core.files import whole
from compressor.core.passes import Moves, Rates
from compressor.core.progress import Progress
from compressor.core.tensors import EncodedTensors, write_tensors
from compressor.core.work import Work
from compressor.learning.distillation import distill
from compressor.learning.head import Head
from compressor.learning.student import Student
from compressor.plan.plan import Plan
from compressor.plan.recipe import Distill, Recipe
from compressor.sweeps.network import Network
from compressor.sweeps.survey import head_inputs, head_of, measure_logits

LEARNED = "learned.safetensors"


def learn(
    network: Network, tensors: EncodedTensors, files: list[Path], batches: list[Batch], recipe: Recipe, plan: Plan,
    work: Work, progress: Progress,
) -> EncodedTensors:  # fmt: skip
    """The tensors with what was learned in place of what was encoded; unchanged where nothing learns.

    Args:
        network: The original, of whose weights none is replaced.
        tensors: What the `files` hold.
    """
    settings, checkpoint = recipe.distill, network.checkpoint
    original_head = head_of(network.module)
    if not settings.steps or original_head is None or network.blocks == [""] or not batches:
        return tensors
    file = work.folder / LEARNED
    if not file.exists():
        measure_logits(network, batches[0])
        if network.blocks == [""]:  # which only shows when it is run
            return tensors
        if network.logits is None:
            raise CheckpointError(
                f"{checkpoint.path}: what it makes of its head's outputs is neither a scale nor a cap, and learning "
                "needs its own logits; write distill: {steps: 0}"
            )
        rows = _predictions(network, batches, recipe.calibration.tokens, work, progress)
        dtype = torch.bfloat16 if network.fast else torch.float32
        table = checkpoint.read(_name_of(original_head.weight, network)).to(network.device, dtype)
        bias = None if original_head.bias is None else checkpoint.read(_name_of(original_head.bias, network)).float()
        teacher = Head(table, None if bias is None else bias.to(network.device), network.logits)
        there = EncodedTensors(files, tensors.tied, device=network.device)
        student = _student(network, there, settings, plan.pruned)
        head = head_of(student.module)
        assert head is not None
        rates = Rates(settings.codebook_rate, settings.scale_rate, settings.dense_rate)

        def due(step: int) -> tuple[Batch, Tensor]:
            number = step % len(batches)
            return network.placed(batches[number]), rows(number)

        with progress.task("distilling", settings.steps) as task:
            for entry in distill(
                student, due, teacher, head, settings.steps, rates, dtype, lambda note: task.advance(note=note),
                network.blocks,
            ):  # fmt: skip
                work.log.append(entry)
        write_tensors(file, student.results())
    return EncodedTensors([*files, file], tensors.tied)


def _name_of(weight: Tensor, network: Network) -> str:
    return next(name for name, parameter in network.module.named_parameters() if parameter is weight)


def _predictions(
    network: Network, batches: list[Batch], at_once: int, work: Work, progress: Progress
) -> Callable[[int], Tensor]:
    """What the original's head is given for each batch, by its number; it runs over `at_once` tokens at a time."""
    size = max(1, at_once // batches[0]["input_ids"].numel())
    starts = range(0, len(batches), size)
    files = [work.folder / f"predictions-{number}.safetensors" for number in range(len(starts))]
    with progress.task("running the original", len(network.blocks) * len(files)) as task:
        for start, file in zip(starts, files, strict=True):
            if file.exists():
                continue
            rows = head_inputs(network, batches[start : start + size], lambda: task.advance())
            with whole(file) as partial:
                save_file({str(number): each for number, each in enumerate(rows)}, partial)
            network.last = []
    opened = [safe_open(str(file), framework="pt") for file in files]
    return lambda number: opened[number // size].get_tensor(str(number % size)).to(network.device)


def _student(original: Network, tensors: EncodedTensors, settings: Distill, pruned: Collection[str]) -> Student:
    module = Network(original.checkpoint, original.fast, original.device).module
    dtype = torch.bfloat16 if original.fast else torch.float32
    shared: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if id(parameter) not in shared:
            learned = tensors[name].encoding.kind != "dense"  # each step brings values of its own
            values = parameter if learned else tensors[name].decode().to(dtype)
            shared[id(parameter)] = nn.Parameter(values, requires_grad=False)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, shared[id(parameter)])
    return Student(module, tensors, Moves(settings.mapping_rate), pruned=pruned)
