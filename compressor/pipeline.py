"""The one place that knows the order: open, plan, survey, encode, learn, write, prove, judge.

An artifact is built in `<output>.partial`, beside its target, and renamed at the end. What is finished of an
interrupted run stays there for `--resume`.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor.allocate import Allocation, Target, allocate, refuse_unreachable, summary, target_of
from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.checkpoints.reshaped import RECORD
from compressor.core.artifact import REPORT, Artifact, refuse_target
from compressor.core.encoding import Affine, Codebook, Sparse
from compressor.core.errors import CheckpointError, DataError, ExportError, GateFailed, ResourceError, UsageError
from compressor.core.memory import give_back
from compressor.core.options import RunOptions
from compressor.core.spec import SparseSpec
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.encode import Work, encode_network
from compressor.fitting import Examples
from compressor.footprint import refuse_beyond
from compressor.generated import generated_tokens, n_batches
from compressor.judge import came_true, failed_gates, judge, promised, prove
from compressor.ladder import Ladder
from compressor.learn import learn
from compressor.original import bench_original
from compressor.parallel import process_group, rank, wait
from compressor.plan import Plan, make_plan
from compressor.progress import Progress
from compressor.recipe import Recipe, learning_window, load_recipe
from compressor.recipe_file import restore_recipe
from compressor.samples import (
    Samples,
    calibration_batches,
    calibration_labels,
    learning_batches,
    load_samples,
    n_generated,
    training_examples,
)
from compressor.streaming import Batch, Network
from compressor.structure import Reference, restructure
from compressor.survey import Survey, survey

WEIGHTS = "model.safetensors"
_VERSIONS = ("compressor", "torch", "onnxruntime", "transformers", "numpy")


@dataclasses.dataclass
class _Clock:
    """CPU and wall seconds of each stage."""

    stages: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def stage(self, name: str) -> _Stage:
        return _Stage(self, name)


class _Stage:
    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = {"cpu_seconds": time.process_time() - self.cpu, "seconds": time.monotonic() - self.wall}
        self.clock.stages[self.name] = {key: round(value, 2) for key, value in spent.items()}
        gc.collect()  # networks hold themselves in cycles
        give_back()


def run(options: RunOptions) -> Artifact:
    """Compresses a checkpoint as `options` say; returns the artifact.

    Raises:
        CompressorError: Of the kind that `compressor.core.errors` lists. UsageError before anything is done where
            something stands in the output's place; GateFailed after the artifact is written.
    """
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
    samples = load_samples(checkpoint, recipe, options)
    wait()  # for the working folder
    work = Work(_partial(options) / "work", options.seed)
    restructure(checkpoint, recipe, _reference(samples, recipe, work), work, Progress())
    wait()
    return Artifact.open(options.directory)


def _partial(options: RunOptions) -> Path:
    """Where the artifact is built."""
    return options.directory.with_name(options.directory.name + ".partial")


def _run(options: RunOptions) -> Artifact:
    """`run`, in the first process."""
    refuse_target(options.directory, options.force)
    progress = options.progress or Progress()
    clock = _Clock()
    recipe = load_recipe(options.recipe, options.sets)
    checkpoint = open_checkpoint(options.model, arch=options.arch, trust_pickle=options.trust_pickle)
    checkpoint.check()
    plan = make_plan(checkpoint, recipe, options.format)
    if options.max_ram is not None:
        refuse_beyond(options.max_ram, plan, checkpoint.config or {}, recipe)
    _refuse_unwritable(plan, options, recipe)
    ladder = None if recipe.structure else _ladder(plan, recipe, options)
    samples = load_samples(checkpoint, recipe, options)
    if options.allocates and samples.calibration is None:
        raise DataError(f"{checkpoint.path}: widths are allocated by what each tensor matters on data; give --data")
    target = target_of(options, checkpoint.family, samples)
    recipe = recipe.model_copy(update={"gates": promised(recipe.gates, target)})
    progress.say(_announcement(plan, checkpoint))
    partial = _partial(options)
    try:
        work = _open_work(partial, recipe, checkpoint, samples, options)
        checkpoint.write_tokenizer(partial)
        wait()
        original, shrunk = checkpoint, []
        if recipe.structure:
            with clock.stage("structure"):
                checkpoint, shrunk = restructure(checkpoint, recipe, _reference(samples, recipe, work), work, progress)
            plan = make_plan(checkpoint, recipe, options.format, smaller=True)
            ladder = _ladder(plan, recipe, options)
        tensors, batches, allocation = _encode(
            checkpoint, recipe, plan, ladder, target, samples, work, progress, clock, options
        )
        plan = allocation.plan if allocation else plan
        with clock.stage("export"):
            offsets = _write(checkpoint, tensors, plan, partial)
            tensors = EncodedTensors([partial / WEIGHTS])
            least = _export(checkpoint, tensors, offsets, partial, options, recipe, batches)
        with clock.stage("evaluation"):
            proof = prove(checkpoint, tensors, offsets, partial, options, batches)
            quality = judge(original, samples, recipe, partial, options.format, progress)
        report = _report(original, recipe, plan, samples, options, clock, work)
        report |= {"structure": shrunk} if shrunk else {}
        report |= {"proof": proof, "quality": quality, "least_onnxruntime": least}
        failures = failed_gates(recipe.gates, quality)
        if allocation is not None:
            report["allocation"] = allocation.report | {"loss": came_true(target.kind, quality)}
        report["gates"] = {"passed": not failures, "failures": failures}
        _finish(partial, options, report, work, original, batches if recipe.evaluation.tokens else [])
    except (CheckpointError, DataError):
        if not (partial / WEIGHTS).exists():  # the input is at fault: there is nothing to resume
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{partial}: the disk is full; free some space, then --resume goes on") from error
        raise
    if failures:
        raise GateFailed(f"{options.directory}: {'; '.join(failures)}; the artifact is kept, marked as failed")
    return Artifact.open(options.directory)


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


def _open_work(partial: Path, recipe: Recipe, checkpoint: Checkpoint, samples: Samples, options: RunOptions) -> Work:
    """The working folder of this very run; an older one of another run is replaced, or refused with --resume."""
    identity = {
        "recipe": recipe.to_dict(), "seed": options.seed, "source": checkpoint.digest(), "data": samples.digest(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "target": [options.target_size, options.max_loss],
    }  # fmt: skip
    folder, note = partial / "work", partial / "work" / "run.json"
    text = json.dumps(identity, sort_keys=True)
    if options.resume and not note.exists():
        raise UsageError(f"{partial}: no interrupted run to resume; leave --resume out")
    if options.resume and note.read_text() != text:
        raise UsageError(f"{partial}: belongs to another run (model, recipe, seed or data differ); leave --resume out")
    if not options.resume and partial.exists():
        if not note.exists() and any(partial.iterdir()):
            raise UsageError(f"{partial}: is in the way and not ours; move it, or give another directory with -o")
        shutil.rmtree(partial)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(text)
    return Work(folder, options.seed)


def _encode(
    checkpoint: Checkpoint, recipe: Recipe, plan: Plan, ladder: Ladder | None, target: Target, samples: Samples,
    work: Work, progress: Progress, clock: _Clock, options: RunOptions,
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
    partial = file.with_suffix(".partial")
    save_file(found.pack(), partial)
    partial.rename(file)
    return found


def _write(checkpoint: Checkpoint, tensors: EncodedTensors, plan: Plan, partial: Path) -> dict[str, tuple[int, int]]:
    if checkpoint.config is not None:
        (partial / "config.json").write_text(json.dumps(checkpoint.config, indent=1, ensure_ascii=False) + "\n")
    if checkpoint.reshaping is not None:
        (partial / RECORD).write_text(checkpoint.reshaping.text())
    return write_tensors(partial / WEIGHTS, _Stored(tensors, plan), tensors.tied)


class _Stored(Mapping[str, EncodedTensor]):
    """The tensors as the plan stores them: sparse ones without the codes of zeros."""

    def __init__(self, tensors: EncodedTensors, plan: Plan) -> None:
        self.tensors = tensors
        self.sparse = {tensor.name for tensor in plan.tensors if isinstance(tensor.spec, SparseSpec)}

    def __getitem__(self, name: str) -> EncodedTensor:
        tensor = self.tensors[name]
        if name not in self.sparse:
            return tensor
        assert isinstance(tensor.encoding, (Affine, Codebook))
        return EncodedTensor(Sparse(tensor.encoding.shape, tensor.encoding), tensor.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _export(
    checkpoint: Checkpoint, tensors: EncodedTensors, offsets: dict[str, tuple[int, int]], partial: Path,
    options: RunOptions, recipe: Recipe, batches: list[Batch],
) -> str | None:  # fmt: skip
    """Writes the graph; returns the least onnxruntime that runs it, or None for --format safetensors."""
    if options.format != "onnx":
        return None
    from compressor.export.check import slow_paths
    from compressor.export.lowering import least_version
    from compressor.export.writing import export_graph

    exact, static = (recipe.export.activations == kind for kind in ("exact", "static_int8"))
    graph = export_graph(checkpoint, tensors, offsets, partial, options.mode, exact, batches, static)
    slow = slow_paths(graph, exact)
    if slow:
        raise ExportError(f"{graph}: onnxruntime would run it slowly: {'; '.join(slow[:3])}; please report the recipe")
    return least_version([tensors.describe(name) for name in tensors], options.mode)


def _report(
    checkpoint: Checkpoint, recipe: Recipe, plan: Plan, samples: Samples, options: RunOptions, clock: _Clock, work: Work
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
                 "sha256": samples.digest(), "overlap": samples.overlap},
        "versions": {name: metadata.version(name) for name in _VERSIONS} | {"python": platform.python_version()},
        "cost": clock.stages,
        "skipped": {tensor.name: tensor.reason for tensor in plan.tensors if tensor.reason},
        "learning": work.log,
    }  # fmt: skip


def _finish(
    partial: Path, options: RunOptions, report: dict[str, Any], work: Work, checkpoint: Checkpoint, batches: list[Batch]
) -> None:
    """Sizes and hashes into the report, the working folder away, and the artifact into its place."""
    from compressor.evaluate.bench import bench, size

    if options.format == "onnx":
        report["speed"] = bench(partial)
        report["original_speed"] = bench_original(checkpoint, partial, batches) if batches else None
    shutil.rmtree(work.folder)  # only now that nothing can fail but the disk: --resume needs it
    if options.format == "onnx":
        report["size"] = size(partial)
    else:
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        report["size"] = {"bytes": sum(files.values()), "files": files}
    report["size"]["original_bytes"] = report["source"]["file_bytes"]
    report["sha256"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(partial.glob("model.*"))
    }
    (partial / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    target = options.directory
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def evaluate(directory: Path | str, data: str | None = None) -> dict[str, Any]:
    """Measures an artifact's quality again, beside the original's where that is still where it was.

    Raises:
        CheckpointError: It is no artifact, or its original is gone.
    """
    artifact = Artifact.open(directory)
    report = artifact.report
    source = Path(report["source"]["path"])
    if not source.exists():
        raise CheckpointError(f"{source}: the original is gone; it is needed to compare with")
    checkpoint = open_checkpoint(source, arch=report["source"]["arch"])
    recipe = restore_recipe(report["recipe"], str(artifact.directory / REPORT))
    options = RunOptions(model=str(source), eval=data, data=None)
    samples = load_samples(checkpoint, recipe, options)
    format = "onnx" if (artifact.directory / "model.onnx").exists() else "safetensors"
    return judge(checkpoint, samples, recipe, artifact.directory, format, Progress()) or {}
