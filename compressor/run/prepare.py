"""From options to all that a run begins with: for a run, for the processes that torchrun starts beside it, and for
--dry-run alike. What can be refused before work begins is refused here, so that all three refuse the same.

From headers and the config alone, without torch, but for what only the network itself tells: docs/design.md says what
that is.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.core.artifact import refuse_target
from compressor.core.device import HOST, device_of, product_of, refuse_device
from compressor.core.errors import CheckpointError, DataError, RecipeError, UsageError
from compressor.core.options import RunOptions, refuse_seed
from compressor.core.passes import StructureSettings
from compressor.core.roles import block_of
from compressor.core.training import Training, alone, too_few, unlabelled
from compressor.export.decoder_config import decoder_refusal
from compressor.export.forms import int8_refusal, refusal
from compressor.export.in_use import memory_in_use
from compressor.export.measured import TRACED, TRACED_WITH_CACHE
from compressor.plan.memory import of_a_worker, refuse_beyond
from compressor.plan.plan import Plan
from compressor.plan.planning import make_plan, on_floats, planned_with
from compressor.plan.recipe import MEASURED_TEXT, SHORTEST_WINDOW, Recipe
from compressor.plan.recipe_file import load_recipe, refuse_reaching
from compressor.plan.searching import InEight, widened, with_search
from compressor.plan.targets import aimed
from compressor.plan.workload import Workload, workload_of
from compressor.run.nesting import example_of, refuse_sizes, with_sizes
from compressor.widths.ladder import Ladder, in_eight_bits

if TYPE_CHECKING:
    from compressor.core.batch import Batch
    from compressor.data.samples import Samples
    from compressor.data.text import Text

CERTAIN = 64
"""Bytes that no token of a text exceeds on average: of longer texts the tokens need not be counted."""
PROJECTED = re.compile(r"(^|\.)weight_hr_l\d+(_reverse)?$")
"""Names of the matrices that project the state of torch's LSTM."""
TOKENIZERS = ("tokenizer", "vocab", "merges")
"""What names of a tokenizer's files begin with."""


@dataclass(frozen=True)
class Prepared:
    """What a run begins with.

    asked     the options as they were given
    loaded    the recipe as it is written
    options   without the targets that a pass of the recipe takes over
    recipe    with those, and with windows that the network has positions for
    checkpoint  the original: its tensors by name, of which none is read yet
    plan      what will become of each tensor; bytes, memory and seconds
    ladder    the widths to allocate from; None where none are, and where the network first becomes another
    device    where blocks lie while they are computed with, as torch names it
    """

    asked: RunOptions
    loaded: Recipe
    options: RunOptions
    recipe: Recipe
    checkpoint: Checkpoint
    plan: Plan
    ladder: Ladder | None
    device: str = HOST

    @cached_property
    def samples(self) -> Samples:
        """The data, read when they are asked for."""
        from compressor.data.samples import load_samples

        return load_samples(self.checkpoint, self.recipe, self.options)

    @property
    def first_batch(self) -> list[Batch]:
        """One batch of those that a network which reads arrays is calibrated on; of one that reads text none."""
        from compressor.data.batches import calibration_batches

        source = None if self.reads_text else self.samples.calibration
        return [] if source is None else calibration_batches(source, self.recipe, Path(), self.options.seed)[:1]

    def planned(self, plan: Plan) -> Prepared:
        """The same with another plan; data that were read are not read again."""
        found = replace(self, plan=plan)
        vars(found).update({name: value for name, value in vars(self).items() if name == "samples"})
        return found

    @property
    def load(self) -> Workload | None:
        """What the data ask of the network, where they are arrays and were tried on it."""
        if self.reads_text or "samples" not in vars(self):
            return None
        calibration, evaluation = self.samples.calibration, self.samples.evaluation
        load = getattr(calibration or evaluation, "load", None)
        counts = [0 if each is None else len(each) for each in (calibration, evaluation)]
        return None if load is None else workload_of(load, self.recipe, *counts)

    @property
    def reads_text(self) -> bool:
        """Whether the network's data are text."""
        return self.checkpoint.family in ("decoder", "encoder")

    @property
    def judges(self) -> bool:
        """Whether quality is measured, where there are data for it."""
        return self.options.format == "onnx" and not self.recipe.evaluation.skipped


def first_recipe(asked: RunOptions) -> Recipe:
    """The recipe as it is written, where nothing stands in the output's place: what takes no time to refuse.

    Raises:
        UsageError: Something does, or the recipe or the seed is wrong.
    """
    refuse_seed(asked.seed)
    refuse_device(asked.device)
    refuse_target(asked.directory, asked.force, asked.resume)
    refuse_reaching(asked.recipe, asked.trust_recipe)
    return load_recipe(asked.recipe, asked.sets)


def prepare(asked: RunOptions) -> Prepared:
    """All that is known before work begins, of what `asked` asks for: what --dry-run shows is its `plan`.

    Raises:
        UsageError, CheckpointError, DataError, ResourceError: The run would be refused.
    """
    loaded = widened(first_recipe(asked), asked)
    checkpoint = open_checkpoint(asked.model, arch=asked.arch, trust_pickle=asked.trust_pickle)
    checkpoint.check()
    options, recipe = aimed(asked, loaded, checkpoint)
    device = device_of(asked.device, on_host_alone(options, recipe, checkpoint))
    recipe, notes = within_positions(recipe, checkpoint)
    plan = make_plan(checkpoint, recipe, options.format, workers=processes_of(options, checkpoint))
    plan = replace(plan, notes=(*plan.notes, *notes, *checkpoint.notes))
    plan = _with_workers(plan, options, recipe, checkpoint)
    plan = _with_device(plan, device)
    if options.max_ram is not None:
        refuse_beyond(options.max_ram, plan, checkpoint.config or {}, recipe, workers=processes_of(options, checkpoint))
    refuse_unwritable(plan, options, recipe)
    if recipe.export.activations == "static_int8" and options.format == "onnx":
        plan = _on_int8(plan, checkpoint)
    _refuse_passes(recipe, options, checkpoint)
    refuse_sizes(recipe, options, checkpoint)
    plan = with_search(plan, recipe, options, checkpoint, eight_bits_of(recipe, options))
    plan = _without_cache(plan, checkpoint, options)
    ladder = None if recipe.early else ladder_of(plan, recipe, options)
    found = Prepared(asked, loaded, options, recipe, checkpoint, plan, ladder, device)
    _refuse_data(found)
    _refuse_undivided(found)
    samples = None if found.reads_text and options.data is None else found.samples
    found = found.planned(with_sizes(found.plan, recipe, options, checkpoint, samples))
    found = found.planned(_examined(found, samples))
    return _with_memory(_tried(_with_load(found)))


def on_host_alone(options: RunOptions, recipe: Recipe, checkpoint: Checkpoint) -> str:
    """Why no block of a run can be on a GPU; empty where all of them can."""
    if checkpoint.family not in ("decoder", "encoder") or checkpoint.kind == "onnx":
        return f"{checkpoint.path} runs on cpu alone, as all do but language models and encoders of transformers"
    if recipe.early:
        return f"{recipe.early[0].name} runs on cpu alone"
    if options.allocates:
        return "widths are allocated on cpu alone, for --target-size and --max-loss"
    if options.searches:
        return "networks are searched on cpu alone, for --target-latency and --target-speedup"
    if options.side_by_side:
        return f"{side_by_side_as_asked(options)}: blocks are encoded side by side on cpu alone"
    return ""


def _with_device(plan: Plan, device: str) -> Plan:
    """The plan, which notes where blocks lie if that is not the host."""
    if device == HOST:
        return plan
    note = f"blocks are on {device}, {product_of(device)}; planned are memory of both together, and the time of a cpu"
    return replace(plan, notes=(*plan.notes, note))


def processes_of(options: RunOptions, checkpoint: Checkpoint) -> int:
    """How many processes of this machine encode blocks beside the run's own: one for each block at most."""
    if options.engine != "local" or not options.side_by_side:
        return 0
    return min(options.workers or 0, len(_blocks(checkpoint)))


def _blocks(checkpoint: Checkpoint) -> set[str]:
    """Blocks by the names of their tensors."""
    config = checkpoint.config or {}
    return {block for name in checkpoint.tensors if (block := block_of(name, config))}


def _with_workers(plan: Plan, options: RunOptions, recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """The plan with a note of what each of the processes takes that encode blocks, where there are some.

    Raises:
        UsageError: Blocks cannot be encoded side by side.
    """
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers: is {options.workers}; give 1 or more")
    if options.engine == "local" and options.address != "auto":
        raise UsageError(f"--address {options.address}: is of a Ray cluster; add --engine ray, or leave it out")
    if not options.side_by_side:
        return plan
    config, asked = checkpoint.config or {}, side_by_side_as_asked(options)
    if recipe.calibration.inputs == "prefix":
        raise UsageError(
            f"{asked}: with calibration.inputs: prefix a block waits for the compressed ones before it; write --set "
            "calibration.inputs=original, or leave it out"
        )
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{asked}: {checkpoint.path} has an encoder and a decoder, which are one block; leave it out")
    blocks = _blocks(checkpoint)
    if len(blocks) < 2:
        raise UsageError(
            f"{asked}: {checkpoint.path} has no repeated block, of which several could be encoded at a time; leave it "
            "out"
        )
    each = f"about {of_a_worker(plan.tensors, config, recipe) / 1e9:.1f} GB"
    if options.engine == "ray":
        if find_spec("ray") is None:
            raise UsageError("--engine ray: ray is not installed; pip install 'compressor[ray]'")
        what = f"each Ray task takes {each}"
    else:
        n = processes_of(options, checkpoint)
        more = f", as many as there are blocks, and not {options.workers}" if n < (options.workers or 0) else ""
        what = f"each of {n} workers takes {each}{more}"
    return replace(plan, notes=(*plan.notes, f"blocks are encoded side by side; {what}"))


def side_by_side_as_asked(options: RunOptions) -> str:
    """The option that asks for blocks side by side, as the user wrote it."""
    return "--engine ray" if options.engine == "ray" else f"--workers {options.workers}"


def _refuse_undivided(found: Prepared) -> None:
    """Refuses to encode blocks side by side where the network itself, built without weights, has none; one that reads
    arrays is tried on a batch of them."""
    options, checkpoint = found.asked, found.checkpoint
    if not options.side_by_side:
        return
    from compressor.sweeps.side_by_side import refuse_undivided

    refuse_undivided(checkpoint, found.first_batch, side_by_side_as_asked(options))


def _with_load(found: Prepared) -> Prepared:
    """With a plan of the memory and the time that the data ask for, where they were tried on the network.

    Raises:
        ResourceError: That is more memory than there may be.
        RecipeError: They are too few for the steps that a pass takes.
    """
    load = found.load
    if load is None:
        return found
    for settings in (step.settings for step in found.recipe.early):
        if isinstance(settings, Training):
            _refuse_haste(settings, load.n_trained)
    workers = processes_of(found.options, found.checkpoint)
    plan = planned_with(found.plan, found.checkpoint, found.recipe, load, workers)
    if found.options.max_ram is not None:
        refuse_beyond(found.options.max_ram, plan, found.checkpoint.config or {}, found.recipe, load, workers)
    return found.planned(plan)


def _with_memory(found: Prepared) -> Prepared:
    """With what the artifact will take in onnxruntime, and a note where that is more than a gate allows.

    Not of mode standard, whose weights are repacked.
    """
    options, plan, recipe = found.options, found.plan, found.recipe
    if options.format != "onnx" or options.mode == "standard":
        return found
    static, config = recipe.export.activations == "static_int8", found.checkpoint.config or {}
    in_use = memory_in_use(plan.tensors, plan.tied, config, options.mode, static, found.load)
    limit, most = recipe.gates.max_memory, in_use.most(MEASURED_TEXT if in_use.per_thousand_tokens else 0)
    notes = plan.notes
    if limit is not None and most > limit:
        notes = (
            *notes,
            f"gates.max_memory is {limit / 1e6:,.0f} MB, and the artifact will take about {most / 1e6:,.0f} MB",
        )
    return found.planned(replace(plan, in_use=in_use, notes=notes))


def within_positions(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with no window longer than the network has positions for, and a note where one was.

    Raises:
        CheckpointError: There are too few for any window.
    """
    longest = checkpoint.positions
    if checkpoint.family not in ("decoder", "encoder") or longest is None:
        return recipe, ()
    if longest < SHORTEST_WINDOW:
        raise CheckpointError(
            f"{checkpoint.path}: has positions for {longest} tokens, and windows of text have at least "
            f"{SHORTEST_WINDOW}; give a network with more"
        )
    long = [name for name in ("calibration", "evaluation") if getattr(recipe, name).window > longest]
    for name in long:
        section = getattr(recipe, name).model_copy(update={"window": longest})
        recipe = recipe.model_copy(update={name: section})
    where = " and ".join(f"{name}.window" for name in long)
    return recipe, (f"{where}: {longest} tokens, as many as the network has positions for",) if long else ()


def _without_cache(plan: Plan, checkpoint: Checkpoint, options: RunOptions) -> Plan:
    """The plan with a note where the graph of a language model will not keep what it has read.

    Raises:
        CheckpointError: torch cannot trace it.
    """
    if options.format != "onnx" or checkpoint.kind == "onnx" or checkpoint.family != "decoder":
        return plan
    config = checkpoint.config or {}
    if config.get("model_type") in TRACED_WITH_CACHE or decoder_refusal(config) is None:
        return plan
    return _with_trial(plan, checkpoint, [])


def eight_bits_of(recipe: Recipe, options: RunOptions) -> InEight:
    """What a search stores linear layers with in 8 bits."""
    return lambda tensor: in_eight_bits(tensor, recipe, options.format, options.mode)


def ladder_of(plan: Plan, recipe: Recipe, options: RunOptions) -> Ladder | None:
    """The widths to allocate from, where they are; refused where the smallest are too large."""
    ladder = Ladder.of(plan, recipe, options.format, options.mode) if options.allocates else None
    if ladder is not None and options.target_size is not None:
        ladder.refuse_unreachable(options.target_size)
    return ladder


def refuse_unwritable(plan: Plan, options: RunOptions, recipe: Recipe) -> None:
    """Refuses what the format cannot hold."""
    if options.format != "onnx":
        return
    projected = next((tensor.name for tensor in plan.tensors if PROJECTED.search(tensor.name)), None)
    if projected is not None:
        raise CheckpointError(
            f"{plan.model}: '{projected}' is of an LSTM with proj_size, and ONNX's LSTM projects nothing; write "
            "--format safetensors, or give a network without"
        )
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


def _on_int8(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The plan with a note of the convolutions that compute on floats all the same.

    Raises:
        UsageError: All of them do.
    """
    convolutions = [tensor for tensor in plan.tensors if tensor.by and tensor.role == "conv"]
    reasons = on_floats(plan, checkpoint)
    if len(reasons) == len(convolutions) and checkpoint.kind != "onnx":
        name, reason = next(iter(reasons.items()))
        raise UsageError(
            f"{plan.recipe}: activations: static_int8 is of convolutions, and none of {plan.model} can compute on "
            f"int8; '{name}' is {reason}; write --set export.activations=int8"
        )
    notes = tuple(f"'{name}' computes on floats: it is {reason}" for name, reason in reasons.items())
    return replace(plan, notes=(*plan.notes, *notes))


def _refuse_passes(recipe: Recipe, options: RunOptions, checkpoint: Checkpoint) -> None:
    """Refuses passes that this kind of network cannot go through, or not together with what else is asked."""
    for step in recipe.early:
        settings = step.settings
        reason = settings.refuses_decoders if checkpoint.family == "decoder" else settings.refuses_others
        if reason:
            raise CheckpointError(f"{checkpoint.path}: {reason}")
        n_blocks = len(_blocks(checkpoint))
        if isinstance(settings, StructureSettings) and n_blocks and (reason := settings.refuses_blocks(n_blocks)):
            raise RecipeError(f"{settings.name}: {reason}")
        if isinstance(settings, Training) and settings.gradients == "compressed":
            _refuse_alone(settings)
    if options.allocates and any(step.settings.signs_inputs for step in recipe.early):
        raise UsageError(
            f"{recipe.name}: widths are allocated by gradients, and binary inputs have none; leave --target-size and "
            "--max-loss out, or write activations: float"
        )


def _examined(found: Prepared, samples: Samples | None) -> Plan:
    """The plan with what the first structure pass says of the network; of what comes after it nothing is known yet.

    Transformers that were measured to be traced are not traced for it unless the pass may have something to say of its
    own: of billions of parameters that takes a while.

    Raises:
        CheckpointError: The network cannot be traced, or not go through the pass.
        RecipeError: A file that the pass names is none of its own.
    """
    checkpoint, first = found.checkpoint, found.recipe.early[0] if found.recipe.early else None
    if first is None or not isinstance(first.settings, StructureSettings) or first.settings.sizes:
        return found.plan
    traced = checkpoint.family == "decoder" or (checkpoint.config or {}).get("model_type") in TRACED
    if traced and not first.settings.examines(_in_blocks(found.plan)):
        return found.plan
    from compressor.structure.stage import without_weights

    method, subject = without_weights(checkpoint, first, example_of(found.recipe, found.options, samples))
    return replace(found.plan, notes=(*found.plan.notes, *method.examine(subject)))


def _in_blocks(plan: Plan) -> float:
    """Of a transformer's parameters, the share that its blocks have."""
    counts = {tensor.name: math.prod(tensor.shape) for tensor in plan.tensors}
    return sum(n for name, n in counts.items() if block_of(name)) / max(1, sum(counts.values()))


def _refuse_alone(settings: Training) -> None:
    """Refuses to compress what one process would send, where there is no other."""
    from compressor.runtime.torchrun import n_started

    if n_started() == 1:
        raise RecipeError(alone(settings))


def _refuse_haste(settings: Training, n_examples: int) -> None:
    from compressor.runtime.torchrun import n_started

    n_processes = n_started()
    n_steps, batch = settings.steps(n_examples, n_processes)
    if settings.epochs and not batch:
        raise DataError(too_few(settings, n_examples, n_processes))
    if reason := settings.refuses_steps(n_steps):
        raise RecipeError(f"{settings.name}: {reason}")


def _refuse_data(found: Prepared) -> None:
    """Refuses data that are missing, cannot be read, or do not suit. The built-in text is not read for it."""
    checkpoint, options, recipe = found.checkpoint, found.options, found.recipe
    if options.data is None and not found.reads_text:
        if options.searches:
            raise DataError(f"{checkpoint.path}: networks are searched by what they lose on data; give --data")
        _refuse_without_example(found)
    if found.reads_text:
        _refuse_without_tokenizer(checkpoint)
    if options.data is not None or options.eval is not None or not found.reads_text:
        _refuse_unsuitable(found)
    if options.allocates and not found.reads_text and found.samples.calibration is None:
        raise DataError(f"{checkpoint.path}: widths are allocated by what each tensor matters on data; give --data")
    _refuse_unlabelled(found)
    if recipe.writes_text:
        _refuse_speechless(checkpoint)


def _tried(found: Prepared) -> Prepared:
    """The same, where torch can trace a network of transformers that was not measured to be traced; its plan says so
    where an encoder-decoder will have no cache. Decoders have been tried by then.

    Raises:
        CheckpointError: torch cannot trace it.
    """
    checkpoint, options, config = found.checkpoint, found.options, found.checkpoint.config
    if options.format != "onnx" or checkpoint.kind == "onnx" or checkpoint.family == "decoder" or config is None:
        return found
    if config.get("model_type") in TRACED:
        return found
    return found.planned(_with_trial(found.plan, checkpoint, found.first_batch))


def _with_trial(plan: Plan, checkpoint: Checkpoint, batches: list[Batch]) -> Plan:
    """The plan, which notes where the graph of a network that writes text will have no cache."""
    from compressor.export.planned import PlannedTensors
    from compressor.export.writing import try_to_trace

    reason = try_to_trace(checkpoint, PlannedTensors(plan, checkpoint), batches)
    if reason is None:
        return plan
    note = f"no KV cache: the graph reads the whole text again for each token; {reason}"
    return replace(plan, notes=(*plan.notes, note))


def _refuse_without_example(found: Prepared) -> None:
    checkpoint, recipe = found.checkpoint, found.recipe
    if "data" in recipe.required:
        return  # which reading the data refuses
    if recipe.early:
        raise DataError(f"{checkpoint.path}: {recipe.early[0].name} traces the network on an example; give --data")
    if found.options.format == "onnx" and checkpoint.kind != "onnx":
        raise DataError(
            f"{checkpoint.path}: its graph is traced on an example of its inputs; give --data with a few (.npz, "
            ".safetensors or module:callable), or write --format safetensors"
        )


def _refuse_without_tokenizer(checkpoint: Checkpoint) -> None:
    names = [path.name for path in checkpoint.tokenizer_files]
    if not any(name.startswith(TOKENIZERS) or name.endswith(".model") for name in names):
        raise DataError(
            f"{checkpoint.path}: has no tokenizer; expected tokenizer.json, or vocab and merges; put the model's "
            "tokenizer files beside its weights"
        )


def _refuse_unsuitable(found: Prepared) -> None:
    """Refuses data that are not of the network's kind, do not fit it, or are too short for one window."""
    from compressor.data.arrays import Arrays
    from compressor.data.text import Text

    samples = found.samples
    if found.judges and found.checkpoint.family == "decoder" and isinstance(samples.evaluation, Arrays):
        raise DataError(
            f"{samples.evaluation.source}: holds arrays, and a language model is judged on text; give --eval with "
            "text, or leave that out with --set evaluation.tokens=0"
        )
    if not found.reads_text:
        return
    if isinstance(samples.calibration, Text):
        _refuse_small(samples.calibration, found.recipe.calibration.window, found.checkpoint)
    if found.judges and isinstance(samples.evaluation, Text):
        if found.checkpoint.family == "encoder":
            samples.evaluation.sentences()
        else:
            _refuse_small(samples.evaluation, found.recipe.evaluation.window, found.checkpoint)


def _refuse_small(text: Text, window: int, checkpoint: Checkpoint) -> None:
    """Looks at the tokens of a text that may have fewer than a window; those of longer ones are left to the run."""
    from compressor.data.samples import vocabulary_of
    from compressor.data.tokens import refuse_tokens

    if len(text.content) > CERTAIN * window:
        return
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        checkpoint.write_tokenizer(Path(scratch))
        refuse_tokens(text, scratch, checkpoint.family, window, vocabulary_of(checkpoint))


def refuse_tokens_of(found: Prepared, tokenizer: Path) -> None:
    """Looks at the tokens of all texts, once the tokenizer is written; before anything is computed.

    Raises:
        DataError: A text is too short for one window, or has tokens that the network has no entry for.
    """
    from compressor.data.samples import vocabulary_of
    from compressor.data.text import Text
    from compressor.data.tokens import refuse_tokens

    recipe, checkpoint = found.recipe, found.checkpoint
    texts = {"calibration": found.samples.calibration, "evaluation": found.samples.evaluation if found.judges else None}
    for name, source in texts.items():
        if isinstance(source, Text) and (name == "calibration" or checkpoint.family == "decoder"):
            window = getattr(recipe, name).window
            refuse_tokens(source, tokenizer, checkpoint.family, window, vocabulary_of(checkpoint))


def _refuse_speechless(checkpoint: Checkpoint) -> None:
    """Refuses a network that writes no text, or reads all of it again for each token, or of which nothing says what its
    text begins with."""
    from compressor.data.start_token import start_token

    files = checkpoint.tokenizer_files
    start_token(checkpoint, files[0].parent if files else checkpoint.path)
    config = checkpoint.config or {}
    if config.get("model_type") not in TRACED_WITH_CACHE and decoder_refusal(config) is not None:
        from compressor.sweeps.written_text import refuse_forgetful

        refuse_forgetful(checkpoint)


def _refuse_unlabelled(found: Prepared) -> None:
    """Refuses data without labels for a pass that learns them."""
    for step in found.recipe.early:
        settings = step.settings
        if not isinstance(settings, Training) or not settings.epochs or settings.loss not in ("labels", "both"):
            continue
        calibration = None if found.options.data is None else found.samples.calibration
        if getattr(calibration, "labels", None) is None:
            raise DataError(unlabelled(settings, settings.loss))
