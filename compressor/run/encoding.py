"""From the original to its encoded tensors: the structure stage, what the original writes, the survey, widths where
they are allocated, the encoding sweep, and learning at the end. Each keeps what it found in the working folder, from
which an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.again import Opening
from compressor.checkpoints.sized import SizedCheckpoint
from compressor.core.batch import Batch, Examples
from compressor.core.device import HOST
from compressor.core.errors import UsageError
from compressor.core.files import whole
from compressor.core.progress import Progress
from compressor.core.spec import DenseSpec
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.data.batches import (
    calibration_batches,
    calibration_labels,
    learning_batches,
    n_generated,
    training_examples,
)
from compressor.data.samples import Samples
from compressor.export.planned import PlannedTensors
from compressor.export.writing import is_traced, traced
from compressor.plan.memory import of_a_worker
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Recipe, learning_window
from compressor.run.clock import Clock
from compressor.run.prepare import Prepared, ladder_of, side_by_side_as_asked
from compressor.runtime.workers import connected_ray
from compressor.structure.stage import Reference, decided, restructure, sizes_of, written_in
from compressor.sweeps.distill import learn
from compressor.sweeps.encode import encode_network, last_head
from compressor.sweeps.network import Network
from compressor.sweeps.side_by_side import FOLDER as SIDE_BY_SIDE
from compressor.sweeps.side_by_side import Workers
from compressor.sweeps.survey import Survey, survey
from compressor.sweeps.written_text import generated_tokens, n_batches
from compressor.widths.allocate import Target, allocate, refuse_unreachable, summary
from compressor.widths.ladder import Ladder

SURVEY = "survey.bin"


@dataclass(frozen=True)
class Course:
    """What is encoded, and how: the network as the structure stage left it, the recipe and the plan for it.

    reports   what each pass of that stage says of itself
    sizes     the smaller networks in it, where that stage made some
    ladder    the widths to allocate from; None where none are
    traced    whether torch has to trace the network for its graph
    workers   processes that encode its blocks; None where this one does
    device    where its blocks lie while they are computed with
    """

    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan
    ladder: Ladder | None
    reports: list[dict[str, Any]]
    traced: bool
    workers: Workers | None
    sizes: tuple[SizedCheckpoint, ...] = ()
    device: str = HOST


@dataclass(frozen=True)
class Encoded:
    """The tensors, the batches that they were encoded on, and the plan as it was carried out.

    allocation   what is said of the widths that were chosen; None where none were
    """

    tensors: EncodedTensors
    batches: list[Batch]
    plan: Plan
    allocation: dict[str, Any] | None


def restructured(start: Prepared, work: Work, progress: Progress, clock: Clock) -> Course:
    """The structure stage, where the recipe has one. Under torchrun every process calls it."""
    if not start.recipe.early:
        there, workers = start.checkpoint, _workers(start, work, start.plan)
        return Course(
            there, start.recipe, start.plan, start.ladder, [], _is_traced(there, start), workers, device=start.device
        )
    with clock.stage("structure"):
        reference = _reference(start.samples, start.recipe, work, start.checkpoint.family)
        checkpoint, reports = restructure(start.checkpoint, start.recipe, reference, work, progress)
    recipe = decided(start.recipe, reports)
    plan = make_plan(checkpoint, recipe, start.options.format, smaller=True)
    ladder = ladder_of(plan, recipe, start.options)
    sizes = tuple(sizes_of(start.checkpoint, start.recipe, work))
    workers = _workers(start, work, plan)
    return Course(checkpoint, recipe, plan, ladder, reports, _is_traced(checkpoint, start), workers, sizes)


def _workers(start: Prepared, work: Work, plan: Plan) -> Workers | None:
    """The processes that are asked for to encode blocks."""
    options, checkpoint = start.asked, start.checkpoint
    if not options.side_by_side:
        return None
    written = written_in(work, len(start.recipe.early) - 1).absolute() if start.recipe.early else None
    opening = Opening(checkpoint.path.absolute(), options.arch, options.trust_pickle, written)
    memory = of_a_worker(plan.tensors, checkpoint.config or {}, start.recipe)
    if options.engine == "ray":
        connected_ray(options.address, "--", "--address local")  # before hours of work
    return Workers(
        opening, work.folder / SIDE_BY_SIDE, options.engine, options.workers, options.address, memory,
        side_by_side_as_asked(options),
    )  # fmt: skip


def _is_traced(checkpoint: Checkpoint, start: Prepared) -> bool:
    return start.options.format == "onnx" and is_traced(checkpoint)


def encode(
    course: Course, samples: Samples, target: Target, work: Work, progress: Progress, clock: Clock
) -> Encoded:  # fmt: skip
    """Everything from the network as it is to its encoded tensors."""
    checkpoint, recipe, plan, ladder = course.checkpoint, course.recipe, course.plan, course.ladder
    batches: list[Batch] = []
    network = Network(checkpoint, device=course.device)
    with clock.stage("generation"):
        written = _generated(network, recipe, work, progress)
    if samples.calibration is not None:
        batches = calibration_batches(
            samples.calibration, recipe, work.folder.parent, work.seed, written, checkpoint.family
        )
    if course.traced:  # first of all, since torch may not be able to
        with clock.stage("tracing"):
            traced(checkpoint, PlannedTensors(plan, checkpoint), batches)
    if ladder is not None:
        try:
            refuse_unreachable(checkpoint, batches, ladder, target)
        except UsageError:
            shutil.rmtree(work.folder.parent)  # nothing is in it yet
            raise
    with clock.stage("survey"):
        found = _survey(network, batches, recipe, plan, work, progress, ladder is not None)
    allocation = None
    if ladder is not None:
        with clock.stage("allocation"):
            allocation = allocate(checkpoint, batches, found, ladder, target, work, progress)
        plan = allocation.plan
        progress.say(summary(allocation.report))
        if not recipe.calibration.token_importance:
            found = dataclasses.replace(found, importance={}, channels={})
    n_steps = len(network.blocks) + 1 + bool(last_head(network, batches, recipe, found))
    with clock.stage("encoding"), progress.task("encoding", n_steps) as task:
        task.advance(0, note="tables")
        network = Network(checkpoint, device=course.device)
        with course.workers or contextlib.nullcontext() as workers:
            tensors, files = encode_network(
                network, batches, recipe, plan, found, work, lambda note: task.advance(note=note), workers
            )
    del network
    if recipe.distill.steps:
        with clock.stage("learning"):
            further = learning_batches(
                samples.calibration, recipe, work.folder.parent, work.seed, written, checkpoint.family
            )
            original = Network(checkpoint, device=course.device)
            tensors = learn(original, tensors, files, further, recipe, plan, work, progress)
    plan = _with_large_values(plan, tensors)
    return Encoded(tensors, batches, plan, None if allocation is None else allocation.report)


def _with_large_values(plan: Plan, tensors: EncodedTensors) -> Plan:
    """The plan, where values have turned out to be beyond float16 and are stored as float32."""

    def is_large(tensor: PlannedTensor) -> bool:
        half = isinstance(tensor.spec, DenseSpec) and tensor.spec.dtype == "F16"
        return half and tensors.nbytes(tensor.name) == 2 * tensor.bytes_after > 0

    wide = DenseSpec(dtype="F32")
    changed = (
        dataclasses.replace(tensor, spec=wide, reason=f"{tensor.reason}; beyond float16")
        if is_large(tensor)
        else tensor
        for tensor in plan.tensors
    )
    return dataclasses.replace(plan, tensors=tuple(changed))


def _reference(samples: Samples, recipe: Recipe, work: Work, family: str) -> Reference:
    """What structure passes choose by, and train on."""
    source, tokenizer = samples.calibration, work.folder.parent
    if source is None:
        return Reference([], None, lambda: Examples({}))
    return Reference(
        calibration_batches(source, recipe, tokenizer, work.seed, family=family),
        calibration_labels(source, recipe, work.seed),
        lambda: training_examples(source, recipe, tokenizer, work.seed, family),
    )


def _generated(network: Network, recipe: Recipe, work: Work, progress: Progress) -> torch.Tensor | None:
    """What the original writes; None where the recipe asks for nothing of it."""
    n = n_generated(recipe)
    if not n:
        return None
    with progress.task("the original writes text", n_batches(n)) as task:
        return generated_tokens(
            network.checkpoint, work.folder.parent, n, learning_window(recipe), work.folder, work.generator,
            network.fast, lambda: task.advance(), network.device,
        )  # fmt: skip


def _survey(
    network: Network, batches: list[Batch], recipe: Recipe, plan: Plan, work: Work, progress: Progress,
    allocates: bool,
) -> Survey:  # fmt: skip
    file = work.folder / SURVEY
    if file.exists():
        return Survey.unpack(load_file(file))
    gradients = (recipe.calibration.token_importance or allocates) and network.blocks != [""]
    norm = plan.gradient_norm
    directions = (2 if gradients else 1) + (2 if norm else 0)
    if not batches or (not gradients and norm is None and last_head(network, batches, recipe)):
        return Survey()  # of an original's forward nothing is wanted
    with progress.task("surveying", directions * len(network.blocks)) as task:
        generator = work.generator("survey")
        found = survey(network, batches, work.folder, gradients, generator, lambda: task.advance(), norm, plan.pruned)
    with whole(file) as partial:
        save_file(found.pack(), partial)
    return found
