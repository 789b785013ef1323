"""The one place that knows the order: open, plan, survey, encode, learn, write, prove, judge.

An artifact is built in `<output>.partial`, beside its target, and renamed at the end. What is finished of an
interrupted run stays there for `--resume`.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.checkpoints.reshaping import RECORD
from compressor.core.artifact import WEIGHTS, Artifact, beside, refuse_target
from compressor.core.batch import Batch, Examples
from compressor.core.encoding import Affine, Codebook, Sparse
from compressor.core.errors import DataError, ExportError, GateFailed, UsageError
from compressor.core.files import whole
from compressor.core.log import LOGGER, LoggedProgress
from compressor.core.memory import keep_freed, quick_collections
from compressor.core.options import RunOptions
from compressor.core.progress import Progress
from compressor.core.spec import SparseSpec
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.core.work import Work
from compressor.data.samples import (
    Samples,
    calibration_batches,
    calibration_labels,
    learning_batches,
    load_samples,
    n_generated,
    refuse_foreign_text,
    training_examples,
)
from compressor.evaluate.judge import judge, prove
from compressor.evaluate.original import bench_original
from compressor.plan.memory import refuse_beyond
from compressor.plan.plan import Plan
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Evaluation, Recipe, learning_window
from compressor.plan.recipe_file import load_recipe
from compressor.plan.targets import aimed
from compressor.run.blame import blame, blamed, weight_errors
from compressor.run.clock import Clock
from compressor.run.delivery import artifact_size, deliver, largest_tensors
from compressor.run.gates import came_true, lost_quality, lost_size_or_speed, measured_kind, promised
from compressor.run.workplace import open_work, workplace
from compressor.runtime.torchrun import process_group, rank, wait
from compressor.structure.stage import Reference, decided, restructure
from compressor.sweeps.distill import learn
from compressor.sweeps.encode import encode_network
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey, survey
from compressor.sweeps.written_text import generated_tokens, n_batches
from compressor.widths.allocate import Allocation, Target, allocate, refuse_unreachable, summary, target_of
from compressor.widths.ladder import Ladder

_VERSIONS = ("compressor", "torch", "onnxruntime", "transformers", "numpy")


def run(options: RunOptions) -> Artifact:
    """Compresses a checkpoint as `options` say; returns the artifact.

    Raises:
        CompressorError: Of the kind that `compressor.core.errors` lists. UsageError before anything is done where
            something stands in the output's place; GateFailed after the artifact is written.
    """
    keep_freed()
    with process_group():
        if rank():
            return _assist(options)
        artifact = _run(options)
        wait()
        return artifact


def _assist(options: RunOptions) -> Artifact:
    """What a process that torchrun started beside the first does: it trains with it, and waits for the artifact."""
    recipe = load_recipe(options.recipe, options.sets)
    checkpoint = open_checkpoint(options.model, arch=options.arch, trust_pickle=options.trust_pickle)
    checkpoint.check()
    options, recipe = aimed(options, recipe, checkpoint)
    samples = load_samples(checkpoint, recipe, options)
    wait()  # for the working folder
    work = Work(_partial(options) / "work", options.seed)
    restructure(checkpoint, recipe, _reference(samples, recipe, work), work, Progress())
    wait()
    return Artifact.open(options.directory)


def _partial(options: RunOptions) -> Path:
    """Where the artifact is built."""
    return beside(options.directory, ".partial")


def _run(options: RunOptions) -> Artifact:
    """`run`, in the first process."""
    refuse_target(options.directory, options.force)
    progress = options.progress or LoggedProgress()
    clock = Clock()
    recipe = load_recipe(options.recipe, options.sets)
    checkpoint = open_checkpoint(options.model, arch=options.arch, trust_pickle=options.trust_pickle)
    checkpoint.check()
    options, recipe = aimed(options, recipe, checkpoint)
    plan = make_plan(checkpoint, recipe, options.format)
    if options.max_ram is not None:
        refuse_beyond(options.max_ram, plan, checkpoint.config or {}, recipe)
    _refuse_unwritable(plan, options, recipe)
    ladder = None if recipe.early else _ladder(plan, recipe, options)
    if options.allocates and any(step.settings.signs_inputs for step in recipe.early):
        raise UsageError(
            f"{recipe.name}: widths are allocated by gradients, and binary inputs have none; leave --target-size and "
            "--max-loss out, or write activations: float"
        )
    samples = load_samples(checkpoint, recipe, options)
    if options.allocates and samples.calibration is None:
        raise DataError(f"{checkpoint.path}: widths are allocated by what each tensor matters on data; give --data")
    target = target_of(options, checkpoint.family, samples)
    progress.say(_announcement(plan, checkpoint))
    partial = _partial(options)
    with workplace(partial), quick_collections():
        work = open_work(partial, recipe, checkpoint, samples, options)
        checkpoint.write_tokenizer(partial)
        refuse_foreign_text(checkpoint, samples, partial)
        wait()
        original, shrunk, asked = checkpoint, [], recipe
        if recipe.early:
            with clock.stage("structure"):
                checkpoint, shrunk = restructure(checkpoint, recipe, _reference(samples, recipe, work), work, progress)
            recipe = decided(recipe, shrunk)
            plan = make_plan(checkpoint, recipe, options.format, smaller=True)
            ladder = _ladder(plan, recipe, options)
        tensors, batches, allocation = _encode(
            checkpoint, recipe, plan, ladder, target, samples, work, progress, clock, options
        )
        plan = allocation.plan if allocation else plan
        with clock.stage("export"):
            _write(checkpoint, tensors, plan, partial)
            tensors = EncodedTensors([partial / WEIGHTS])
            least = _export(checkpoint, tensors, partial, options, recipe, batches)
        with clock.stage("evaluation"):
            proof = prove(checkpoint, tensors, partial, options, batches)
            quality = judge(original, samples, recipe, partial, options.format, progress)
            if samples.evaluation is None and options.format == "onnx" and not recipe.evaluation.skipped:
                LOGGER.warning("%s: no quality was measured: no evaluation data; give eval", options.directory)
        aimed_at = dataclasses.replace(target, kind=measured_kind(quality, target.kind))
        recipe = asked.model_copy(update={"gates": promised(recipe.gates, aimed_at)})
        report = _report(original, recipe, plan, samples, options, clock, work)
        report |= {"structure": shrunk} if shrunk else {}
        report |= {"proof": proof, "quality": quality, "least_onnxruntime": least}
        if allocation is not None:
            report["allocation"] = allocation.report | {"loss": came_true(target.kind, quality)}
        report |= _binary(partial, tensors)
        with clock.stage("benchmark"):
            report |= _speeds(partial, options, original, recipe.evaluation, batches)
        report["size"] = artifact_size(partial, report["source"]["file_bytes"])
        report["errors"] = weight_errors(checkpoint, tensors)
        failures, blames, why = _held_against_gates(
            checkpoint, tensors, plan, batches, aimed_at, recipe, report, progress
        )
        report["gates"] = {"passed": not failures, "failures": failures, "blame": blames}
        directory = deliver(partial, options.directory, report)
    if failures:
        raise GateFailed(f"{options.directory}: {'; '.join([*failures, *why])}; the artifact is kept as {directory}")
    return Artifact.open(directory)


def compress(model: nn.Module | str | Path, recipe: str = "llm-2bit", **options: Any) -> Artifact:
    """Compresses a network in memory or a checkpoint on disk: `run` with `options` as keywords.

        artifact = compressor.compress(network, "encoder-4bit", data="inputs.npz", output=Path("small"))

    Args:
        model: A path, or a module: its weights as they are now, whichever device they are on.
        options: Those of `RunOptions`; `output` is needed for a module that has no name on disk.
    """
    if not isinstance(model, nn.Module):
        return run(RunOptions(model=str(model), recipe=recipe, **options))
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(scratch)
            return run(RunOptions(model=scratch, recipe=recipe, **options))
        path = Path(scratch) / f"{type(model).__name__.lower()}.pt"
        torch.save(model, path)
        return run(RunOptions(model=str(path), recipe=recipe, trust_pickle=True, **options))


def _refuse_unwritable(plan: Plan, options: RunOptions, recipe: Recipe) -> None:
    """Refuses, before work begins, what the format cannot hold."""
    if options.format != "onnx":
        return
    from compressor.export.int8_operations import int8_refusal
    from compressor.export.lowering import refusal

    static = recipe.export.activations == "static_int8"
    if static and not any(tensor.by and tensor.role == "conv" for tensor in plan.tensors):
        raise UsageError(
            f"{plan.recipe}: activations: static_int8 is of convolutions, and no convolution of {plan.model} is "
            "encoded; write activations: int8"
        )
    for tensor in plan.tensors:
        operator = {"linear": "matmul", "embedding": "embedding"}.get(tensor.role, "constant")
        reason = refusal(tensor.describe(), operator, options.mode) if tensor.by else None
        if tensor.by and static and tensor.role == "conv":
            reason = reason or int8_refusal(tensor.describe())
        if reason:
            raise UsageError(f"{plan.recipe}: '{tensor.name}' cannot be written to ONNX: {reason}")


def _ladder(plan: Plan, recipe: Recipe, options: RunOptions) -> Ladder | None:
    """The widths to allocate from, where they are; refused where the smallest are too large."""
    ladder = Ladder.of(plan, recipe, options.format, options.mode) if options.allocates else None
    if ladder is not None and options.target_size is not None:
        ladder.refuse_unreachable(options.target_size)
    return ladder


def _reference(samples: Samples, recipe: Recipe, work: Work) -> Reference:
    """What structure passes choose by, and train on."""
    source, tokenizer = samples.calibration, work.folder.parent
    if source is None:
        return Reference([], None, lambda: Examples({}))
    return Reference(
        calibration_batches(source, recipe, tokenizer, work.seed),
        calibration_labels(source, recipe, work.seed),
        lambda: training_examples(source, recipe, tokenizer, work.seed),
    )


def _announcement(plan: Plan, checkpoint: Checkpoint) -> str:
    encoded = sum(1 for tensor in plan.tensors if tensor.by)
    return (
        f"{checkpoint.architecture}: {plan.bytes_before / 1e6:,.1f} MB in {len(plan.tensors)} tensors, "
        f"{encoded} of them encoded by {plan.recipe} → about {plan.bytes_after / 1e6:,.1f} MB in all; "
        f"peak memory about {plan.peak_memory / 1e9:.1f} GB"
    )


def _encode(
    checkpoint: Checkpoint, recipe: Recipe, plan: Plan, ladder: Ladder | None, target: Target, samples: Samples,
    work: Work, progress: Progress, clock: Clock, options: RunOptions,
) -> tuple[EncodedTensors, list[Batch], Allocation | None]:  # fmt: skip
    """The survey, the allocation of widths where one is asked for, and the encoding sweep."""
    batches: list[Batch] = []
    network = Network(checkpoint)
    with clock.stage("generation"):
        written = _generated(checkpoint, recipe, work, network.fast, progress)
    if samples.calibration is not None:
        batches = calibration_batches(samples.calibration, recipe, work.folder.parent, options.seed, written)
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
    with clock.stage("encoding"), progress.task("encoding", len(network.blocks) + 1) as task:
        network = Network(checkpoint)
        tensors, files = encode_network(
            network, batches, recipe, plan, found, work, lambda note: task.advance(note=note)
        )
    del network
    if recipe.distill.steps:
        with clock.stage("learning"):
            further = learning_batches(samples.calibration, recipe, work.folder.parent, options.seed, written)
            tensors = learn(checkpoint, tensors, files, further, recipe, plan, work, progress)
    return tensors, batches, allocation


def _generated(
    checkpoint: Checkpoint, recipe: Recipe, work: Work, fast: bool, progress: Progress
) -> torch.Tensor | None:
    """What the original writes; None where the recipe asks for nothing of it."""
    n = n_generated(recipe)
    if not n:
        return None
    with progress.task("the original writes text", n_batches(n)) as task:
        return generated_tokens(
            checkpoint, work.folder.parent, n, learning_window(recipe), work.folder, work.generator, fast,
            lambda: task.advance(),
        )  # fmt: skip


def _survey(
    network: Network, batches: list[Batch], recipe: Recipe, plan: Plan, work: Work, progress: Progress,
    allocates: bool,
) -> Survey:  # fmt: skip
    file = work.folder / "survey.bin"
    if file.exists():
        return Survey.unpack(load_file(file))
    gradients = (recipe.calibration.token_importance or allocates) and network.blocks != [""]
    norm = plan.gradient_norm
    directions = (2 if gradients else 1) + (2 if norm else 0)
    if not batches:
        return Survey()
    with progress.task("surveying", directions * len(network.blocks)) as task:
        generator = work.generator("survey")
        found = survey(network, batches, work.folder, gradients, generator, lambda: task.advance(), norm, plan.pruned)
    with whole(file) as partial:
        save_file(found.pack(), partial)
    return found


def _write(checkpoint: Checkpoint, tensors: EncodedTensors, plan: Plan, partial: Path) -> None:
    if checkpoint.config is not None:
        (partial / "config.json").write_text(json.dumps(checkpoint.config, indent=1, ensure_ascii=False) + "\n")
    if checkpoint.reshaping is not None:
        (partial / RECORD).write_text(checkpoint.reshaping.text())
    write_tensors(partial / WEIGHTS, _Stored(tensors, plan), tensors.tied)


class _Stored(Mapping[str, EncodedTensor]):
    """The tensors as the plan stores them: sparse ones without the codes of zeros, in its order, which tells sizes."""

    def __init__(self, tensors: EncodedTensors, plan: Plan) -> None:
        self.tensors = tensors
        self.names = sorted(tensors, key={tensor.name: at for at, tensor in enumerate(plan.tensors)}.__getitem__)
        self.sparse = {tensor.name for tensor in plan.tensors if isinstance(tensor.spec, SparseSpec)}

    def __getitem__(self, name: str) -> EncodedTensor:
        tensor = self.tensors[name]
        if name not in self.sparse:
            return tensor
        assert isinstance(tensor.encoding, (Affine, Codebook))
        return EncodedTensor(Sparse(tensor.encoding.shape, tensor.encoding), tensor.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _export(
    checkpoint: Checkpoint, tensors: EncodedTensors, partial: Path,
    options: RunOptions, recipe: Recipe, batches: list[Batch],
) -> str | None:  # fmt: skip
    """Writes the graph; returns the least onnxruntime that runs it, or None for --format safetensors."""
    if options.format != "onnx":
        return None
    from compressor.export.check import slow_paths
    from compressor.export.lowering import least_version
    from compressor.export.writing import export_graph

    exact, static = (recipe.export.activations == kind for kind in ("exact", "static_int8"))
    graph = export_graph(checkpoint, tensors, partial, options.mode, exact, batches, static)
    slow = slow_paths(graph, exact)
    if slow:
        raise ExportError(f"{graph}: onnxruntime would run it slowly: {'; '.join(slow[:3])}; please report the recipe")
    return least_version([tensors.describe(name) for name in tensors], options.mode)


def _binary(partial: Path, tensors: EncodedTensors) -> dict[str, Any]:
    """What binary layers take and run as, where there are some."""
    from compressor.export.kernels import binary_layers

    found = binary_layers(partial / "model.onnx", tensors)
    return {"binary": found} if found else {}


def _report(
    checkpoint: Checkpoint, recipe: Recipe, plan: Plan, samples: Samples, options: RunOptions, clock: Clock, work: Work
) -> dict[str, Any]:
    """compression.json but for what was measured on the artifact."""
    return {
        "compressor": metadata.version("compressor"),
        "source": checkpoint.describe() | {"sha256": checkpoint.digest(), "arch": options.arch,
                                           "path": str(Path(options.model).resolve())},
        "recipe": recipe.to_dict(),
        "seed": options.seed,
        "mode": options.mode,
        "data": {"calibration": samples.calibration and samples.calibration.source,
                 "evaluation": samples.evaluation and samples.evaluation.source,
                 "sha256": samples.digest(), "overlap": samples.overlap,
                 "arguments": {"data": _found_again(options.data), "eval": _found_again(options.eval)}},
        "versions": {name: metadata.version(name) for name in _VERSIONS} | {"python": platform.python_version()},
        "cost": clock.stages,
        "skipped": {tensor.name: tensor.reason for tensor in plan.tensors if tensor.reason},
        "learning": work.log,
    }  # fmt: skip


def _speeds(
    partial: Path, options: RunOptions, checkpoint: Checkpoint, evaluation: Evaluation, batches: list[Batch]
) -> dict[str, Any]:
    """Of the artifact and of its original, each in a process of its own, or that they were not measured."""
    if options.format != "onnx":
        return {}
    from compressor.evaluate.bench import bench

    shapes: dict[str, list[int]] = {}
    if checkpoint.kind == "onnx" and batches and "input_ids" not in batches[0]:  # axes may be open that are not free
        shapes = {name: [1, *tensor.shape[1:]] for name, tensor in batches[0].items() if tensor.dim()}
    if not evaluation.speed:  # `compress bench` can still measure it, with inputs of these shapes
        return {"speed": {"measured": False} | ({"input_shapes": shapes} if shapes else {}), "original_speed": None}
    batches = [] if evaluation.skipped else batches
    original = bench_original(checkpoint, partial, batches, shapes) if batches else None
    return {"speed": bench(partial, shapes=shapes), "original_speed": original}


def _held_against_gates(
    checkpoint: Checkpoint, tensors: EncodedTensors, plan: Plan, batches: list[Batch], target: Target, recipe: Recipe,
    report: dict[str, Any], progress: Progress,
) -> tuple[list[str], list[dict[str, Any]], list[str]]:  # fmt: skip
    """The gates that failed, where the loss came in, and a sentence on that or on what is large."""
    worse = lost_quality(recipe.gates, report["quality"])
    other = lost_size_or_speed(recipe.gates, report)
    found = blame(checkpoint, tensors, plan, batches, target.kind, target.labelled, progress) if worse else []
    too_large = any(failure.startswith("size") for failure in other)
    why = [blamed(found), largest_tensors(tensors) if too_large else ""]
    return worse + other, found, [sentence for sentence in why if sentence]


def _found_again(argument: str | None) -> str | None:
    """A path that holds in any folder; module:callable as it is."""
    return str(Path(argument).resolve()) if argument is not None and Path(argument).exists() else argument
