"""The one place that knows the order: prepare, make smaller, encode, write, prove, judge, measure, deliver.

An artifact is built in `<output>.partial`, beside its target, and renamed at the end. What is finished of an
interrupted run stays there for `--resume`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.computed import without_parametrisations
from compressor.core.artifact import Artifact, beside
from compressor.core.batch import Batch
from compressor.core.device import repeatable
from compressor.core.errors import ChangedError, GateFailed, UsageError, VerificationError
from compressor.core.files import resolved
from compressor.core.identity import Identity
from compressor.core.log import LOGGER, LoggedProgress
from compressor.core.memory import freed_is_kept, quick_collections
from compressor.core.options import RunOptions
from compressor.core.progress import Progress
from compressor.core.report import Gates, Proof, Quality
from compressor.core.snapshot import Snapshot
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.evaluate.distances import weight_errors
from compressor.evaluate.judge import judge, prove
from compressor.evaluate.original import speeds
from compressor.plan.plan import Plan
from compressor.plan.recipe import Recipe
from compressor.run.blame import blame, blamed
from compressor.run.clock import Clock
from compressor.run.delivery import artifact_size, deliver, largest_tensors
from compressor.run.encoding import encode, restructured
from compressor.run.gates import (
    broken_promises,
    came_true,
    lost_by_sizes,
    lost_quality,
    lost_size_or_speed,
    measured_kind,
    missed_target,
    promised,
)
from compressor.run.identity import identity_of
from compressor.run.place import WORK, Place, held
from compressor.run.prepare import Prepared, prepare, refuse_tokens_of
from compressor.run.report import report_of
from compressor.run.search import checked, deliver_front, narrowed
from compressor.run.sizes import ManySizes
from compressor.run.workplace import delivered, open_work
from compressor.run.write import binary_layers, write_graph, write_weights
from compressor.runtime.torchrun import process_group, rank, wait
from compressor.widths.allocate import target_of


def run(options: RunOptions) -> Artifact:
    """Compresses a checkpoint as `options` say; returns the artifact.

    Raises:
        CompressorError: Of the kind that `compressor.core.errors` lists. What `prepare` refuses is refused before
            anything is done; GateFailed comes after the artifact is written.
    """
    with freed_is_kept(), process_group():
        if rank():
            return _assist(options)
        progress = options.progress or LoggedProgress()
        with held(options.directory, options.force, options.resume, progress.say) as place:
            directory, failures = _run(options, place, progress)
        wait()
    if failures:
        raise GateFailed(f"{options.directory}: {'; '.join(failures)}; the artifact is kept as {directory}")
    return Artifact.open(directory)


def _assist(options: RunOptions) -> Artifact:
    """What a process that torchrun started beside the first does: it trains with it, and waits for the artifact."""
    start = prepare(options)
    wait()  # for the working folder
    restructured(start, Work(_partial(options) / WORK, options.seed), Progress(), Clock())
    wait()
    return Artifact.open(options.directory)


def _partial(options: RunOptions) -> Path:
    """Where the artifact is built."""
    return beside(options.directory, ".partial")


def _run(options: RunOptions, place: Place, progress: Progress) -> tuple[Path, list[str]]:
    """`run`, in the first process: where the artifact is, and which gates it missed."""
    clock = Clock()
    place.watch(Snapshot.of(_paths_of_data(options)))
    start = prepare(options)
    place.watch(start.checkpoint.seen)
    _refuse_replacing_sources(place)
    samples, original = start.samples, start.checkpoint
    identity = identity_of(options, start.loaded, samples.digest(), torch.get_num_threads(), start.device)
    target = target_of(start.options, original.family, samples)
    progress.say(_announcement(start.plan, original))
    for note in original.notes:
        progress.say(f"{original.path}: {note}")
    partial = place.partial
    if (there := delivered(place, identity)) is not None:
        progress.say(f"{there}: was delivered by the run that is to be resumed")
        place.close()
        return there, Artifact.open(there).report["gates"]["failures"]
    with quick_collections():
        work = open_work(place, identity)
        original.write_tokenizer(partial)
        refuse_tokens_of(start, partial)
        wait()
        course = restructured(start, work, progress, clock)
        course, search = narrowed(start, course, target, work, progress, clock)
        with repeatable(course.device):
            encoded = encode(course, samples, target, work, progress, clock)
        checkpoint, recipe = course.checkpoint, course.recipe
        with clock.stage("export"), progress.task("exporting", 2) as task:
            many = ManySizes.of(checkpoint, course.sizes, recipe, course.reports)
            many.refuse_indivisible(encoded.tensors)
            tensors = write_weights(checkpoint, encoded.tensors, encoded.plan, partial, many.own)
            task.advance()
            least = write_graph(checkpoint, tensors, partial, options, recipe, encoded.batches)
            task.advance()
        with clock.stage("evaluation"):
            with progress.task("proving", 1) as task:
                proof = _proved(checkpoint, tensors, partial, options, recipe, encoded.batches)
                task.advance()
            quality = judge(original, samples, recipe, partial, options.format, progress)
            if samples.evaluation is None and options.format == "onnx" and not recipe.evaluation.skipped:
                LOGGER.warning("%s: no quality was measured: no evaluation data; give eval", options.directory)
        aimed_at = dataclasses.replace(target, kind=measured_kind(quality, target.kind))
        asked = start.recipe.model_copy(update={"gates": promised(recipe.gates, aimed_at, quality)})
        report = report_of(start, identity, asked, encoded.plan, course.reports, work)
        report.proof = None if proof is None else Proof.model_validate(proof)
        report.quality = None if quality is None else Quality.model_validate(quality)
        report.least_onnxruntime = least
        if encoded.allocation is not None:
            report.allocation = encoded.allocation | {"loss": came_true(encoded.allocation["kind"], quality)}
        if (binary := binary_layers(partial, tensors)) is not None:
            report.binary = binary
        with clock.stage("benchmark"):
            if options.format == "onnx":
                shown = progress if recipe.evaluation.speed else Progress()
                with shown.task("measuring speed", 1) as task:
                    report.speed, report.original_speed = speeds(
                        partial, original, recipe.evaluation, encoded.batches, recipe.gates.promised_speed
                    )
                    task.advance()
        if search is not None:
            with clock.stage("benchmark"):
                deliver_front(work, partial)
                report.search = checked(search, partial, start, encoded.batches)
        judged = {}
        if many.sized:
            with clock.stage("sizes"):
                judged = many.write(
                    original, tensors, partial, options, recipe, samples, encoded.batches, report, progress
                )  # fmt: skip
        report.size = artifact_size(partial, original)
        report.errors = weight_errors(checkpoint, tensors)
        worse, other = lost_quality(asked.gates, quality), lost_size_or_speed(asked.gates, report)
        broken = broken_promises(recipe.gates, target, quality, report)
        worse, other, doubts = worse + broken[0], other + broken[1], broken[2]
        blames = []
        if worse:
            kind, labelled = aimed_at.kind, aimed_at.labelled
            blames = blame(checkpoint, tensors, encoded.plan, encoded.batches, kind, labelled, progress)
        other += missed_target(report)
        missed, more = lost_by_sizes(asked.gates, recipe.gates, target, judged, report)
        report.gates = Gates.of(worse + other, missed, doubts + more, blames)
        largest = largest_tensors(tensors) if any(failure.startswith("size") for failure in other) else ""
        report.cost = clock.stages
        _refuse_other_contents(start, identity, place)
        directory = deliver(place, report)
    why = () if report.gates.passed else (*report.gates.failures, blamed(blames), largest)
    return directory, [each for each in why if each]


def _proved(
    checkpoint: Checkpoint, tensors: EncodedTensors, partial: Path, options: RunOptions, recipe: Recipe,
    batches: list[Batch],
) -> dict[str, Any] | None:  # fmt: skip
    """As `prove`; a graph of a few blocks repeated that fails is made anew, of all of them."""
    try:
        return prove(checkpoint, tensors, partial, options, batches)
    except VerificationError:
        from compressor.export.writing import retrace

        if not retrace(checkpoint):
            raise
        LOGGER.info("%s: its blocks looked alike and are not; each of them is traced", checkpoint.path)
        write_graph(checkpoint, tensors, partial, options, recipe, batches)
        return prove(checkpoint, tensors, partial, options, batches)


def compress(
    model: nn.Module | str | Path, recipe: str = "llm-2bit", output: str | Path | None = None, **options: Any
) -> Artifact:  # fmt: skip
    """Compresses a network in memory or a checkpoint on disk: `run` with `options` as keywords.

        artifact = compressor.compress(network, "encoder-4bit", "small", data="inputs.npz")

    Args:
        model: A path, or a module: its weights as they are now, whichever device they are on.
        recipe: The name of a shipped one (`compress recipes` lists them), or a file.
        output: The artifact's directory, needed for a module; of a path, `<model>-<recipe>` in the working directory.
        options: The others of `RunOptions`, as `data`, `sets` or `seed`.

    Returns:
        The artifact, with all that was measured in its `report`.

    Raises:
        CompressorError: Of the kind that `compressor.core.errors` lists; `run` says when.
    """
    options |= {"recipe": recipe, "output": None if output is None else Path(output)}
    if not isinstance(model, nn.Module):
        return run(RunOptions(model=str(model), **options))
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        save = getattr(model, "save_pretrained", None)
        if save is not None:
            save(scratch)
            return run(RunOptions(model=scratch, **options))
        path = Path(scratch) / f"{type(model).__name__.lower()}.pt"
        torch.save(without_parametrisations(model), path)
        return run(RunOptions(model=str(path), trust_pickle=True, **options))


def _paths_of_data(options: RunOptions) -> list[Path]:
    return [Path(each) for each in (options.data, options.eval) if each is not None and Path(each).exists()]


def _refuse_replacing_sources(place: Place) -> None:
    """Refuses to put the artifact where what it is made of lies: that would be gone."""
    output = resolved(place.output)
    inside = [name for name in place.sources.files if resolved(Path(name)).is_relative_to(output)]
    if inside:
        raise UsageError(f"{place.output}: would replace {inside[0]}, which is read; give another directory with -o")


def _refuse_other_contents(start: Prepared, identity: Identity, place: Place) -> None:
    """Refuses an artifact whose original or data are others at the end than at the start, whatever the clock says."""
    now = start.samples.digest()
    same = all(identity.data[name] == digest for name, digest in now.items())
    if not same or start.checkpoint.digest() != identity.model["weights"]:
        place.forget()
        raise ChangedError(
            f"{start.checkpoint.path}: it or the data were written again while this run read them; what was made of "
            "them is not kept; leave them alone, and give the same command again"
        )


def _announcement(plan: Plan, checkpoint: Checkpoint) -> str:
    encoded = sum(1 for tensor in plan.tensors if tensor.by)
    return (
        f"{checkpoint.architecture}: {plan.bytes_before / 1e6:,.1f} MB in {len(plan.tensors)} tensors, "
        f"{encoded} of them encoded by {plan.recipe} → about {plan.bytes_after / 1e6:,.1f} MB in all; "
        f"peak memory about {plan.peak_memory / 1e9:.1f} GB"
    )
