"""What a recipe will do with a checkpoint, from headers alone: bytes per tensor and file, memory, time, and what stays.

No torch. The weights' bytes are exact, as is the header of model.safetensors; the graph, memory and time are estimates.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.tokenizer import copied_size
from compressor.core.errors import RecipeError
from compressor.core.passes import Role, WeightSettings
from compressor.core.roles import block_of, is_transposed, matrix_shape, role_of
from compressor.core.spec import DenseSpec, sparse_spec
from compressor.plan.memory import peak_memory
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.recipe import Chosen, Recipe
from compressor.plan.sizes import cpu_seconds, model_files, smaller_bytes, structure_settings
from compressor.plan.workload import Workload

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint, TensorInfo

FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
CONFIG_BYTES = 4096
FEW_CHANNELS = 4
"""As of pictures: a convolution of up to so many computes on floats (export.int8_operations)."""


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, format: str = "onnx", smaller: bool = False, workers: int = 0
) -> Plan:
    """What `recipe` will do with `checkpoint`; `smaller` is one that its structure passes are done with, `workers` are
    processes beside that encode blocks.

    Raises:
        RecipeError: A pattern selects nothing, settings exclude one another, or none of the original is encoded.
    """
    _refuse_original_inputs(recipe)
    _refuse_idle_patterns(checkpoint, recipe)
    if checkpoint.kind == "onnx":
        _refuse_gradients(checkpoint, recipe)
    config = checkpoint.config or {}
    if not smaller:
        for step in recipe.early:
            if step.settings.trains:
                recipe = recipe.leaving(step.name, _likely_ends(checkpoint))
    has_blocks = any(block_of(name, config) for name in checkpoint.tensors)
    tensors = tuple(_planned(info, config, recipe, format, has_blocks) for info in checkpoint.tensors.values())
    _refuse_two_norms(tensors, recipe)
    if has_blocks:
        _refuse_unlearnable(tensors, recipe)
    else:
        _refuse_single_block(checkpoint, recipe)
    if not any(tensor.by for tensor in tensors) and not recipe.early and not smaller:
        reasons = sorted({tensor.reason for tensor in tensors if tensor.reason})
        raise RecipeError(f"{recipe.name}: encodes no tensor of {checkpoint.path}; {'; '.join(reasons)}")
    return Plan(
        model=str(checkpoint.path),
        architecture=checkpoint.architecture,
        recipe=recipe.name,
        tensors=tensors,
        tied=dict(checkpoint.tied),
        files=_files(checkpoint, tensors, format, recipe.export.activations == "static_int8"),
        needs=tuple(sorted(recipe.required)),
        peak_memory=peak_memory(tensors, config, recipe, workers=workers),
        cpu_seconds=cpu_seconds(tensors, recipe),
        notes=_notes(has_blocks) + (() if smaller else _structure_notes(recipe, tensors)),
    )


def planned_with(plan: Plan, checkpoint: Checkpoint, recipe: Recipe, load: Workload, workers: int = 0) -> Plan:
    """The plan, once it is known what the data ask of the network: memory and time are of that."""
    return replace(
        plan,
        peak_memory=peak_memory(plan.tensors, checkpoint.config or {}, recipe, load, workers),
        cpu_seconds=cpu_seconds(plan.tensors, recipe, load),
    )


def on_floats(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """Encoded convolutions that compute on floats whatever the recipe says of activations, each with the reason."""
    reasons: dict[str, str] = {}
    for tensor in plan.tensors:
        if not tensor.by or tensor.role != "conv":
            continue
        info = checkpoint.tensors.get(tensor.name)
        if info is not None and info.place == "transposed":
            reasons[tensor.name] = "transposed, which onnxruntime has no int8 kernel for"
        elif not is_depthwise(tensor.shape, "conv", info.groups if info else None) and tensor.shape[1] <= FEW_CHANNELS:
            reasons[tensor.name] = f"of {tensor.shape[1]} input channels, which is slower so"
    return reasons


def _likely_ends(checkpoint: Checkpoint) -> list[str]:
    """What a trained encoding is likely to leave alone, by order and names: the first and the last layer, shortcuts.

    The traced network decides.
    """
    config = checkpoint.config or {}
    named = [(info.name, role_of(info.name, info.shape, config)) for info in checkpoint.tensors.values()]
    ordered = [name for name, role in named if role in ("linear", "conv", "embedding")]
    ends = {ordered[0], ordered[-1]} if len(ordered) > 2 else set()
    return [name for name in ordered if name in ends or re.search(r"(downsample|shortcut)", name)]


def _planned(info: TensorInfo, config: dict[str, Any], recipe: Recipe, format: str, has_blocks: bool) -> PlannedTensor:
    role = info.role or role_of(info.name, info.shape, config)
    rows, columns = matrix_shape(info.name, info.shape, config)
    matrix = (columns, rows) if info.transposed else (rows, columns)
    transposed = info.transposed or (is_transposed(info.name, config) and role == "linear")
    reason = _reason(info, role, recipe.smallest(role))
    depthwise = is_depthwise(info.shape, role, info.groups)
    chosen = Chosen() if reason else recipe.choose(info.name, matrix, role, depthwise)
    if info.place == "recurrent" and chosen.spec is not None:
        chosen, reason = _recurrent(chosen, recipe, reason)
    if depthwise and chosen.spec is None:
        reason = reason or "depthwise convolution, and no step has 8 bits"
    if chosen.prune and (depthwise or (has_blocks and not block_of(info.name))):
        only = chosen.by == chosen.prune.name
        chosen = Chosen() if only else replace(chosen, prune=None)
        reason = f"{recipe.name} prunes it and no more, and prunes only layers of blocks" if only else reason
    spec = chosen.spec
    if spec is None:
        reason = reason or "no pass of the recipe makes it smaller"
        matrix = (info.shape[0] if info.shape else 1, math.prod(info.shape[1:]))
        kept = recipe.export.dense.replace("float", "F") if _is_float(info) else info.dtype
        spec = DenseSpec(dtype=kept)
    if chosen.prune is not None:
        if not (chosen.method and chosen.method.keeps_zeros):
            raise RecipeError(
                f"{recipe.name}: '{info.name}' is pruned by {chosen.prune.name}, but {chosen.by} as it is set has no "
                "exact zero; choose a grid that has one, as zero: middle"
            )
        if format == "safetensors":
            spec = sparse_spec(spec, *matrix, chosen.prune.kept(*matrix))
    return PlannedTensor(
        info.name, info.shape, role, matrix, info.nbytes, spec, chosen.by, reason, transposed, chosen.method,
        chosen.prune,
    )  # fmt: skip


def _refuse_gradients(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuses what an ONNX graph has no way to do: it computes forwards only."""
    steps = [step for step in recipe.passes if step.settings.needs & {"gradients", "training"}]
    why, advice = "", "give the network as a checkpoint"
    if recipe.structure:
        why = f"{recipe.structure[0].name} makes the network smaller"
    elif steps:
        why = f"{steps[0].name} needs gradients"
    elif recipe.distill.steps or recipe.calibration.generated:
        section = "distill.steps" if recipe.distill.steps else "calibration.generated"
        why = f"{section} needs gradients" if recipe.distill.steps else f"{section} needs the network's own text"
        advice = f"leave that out with --set {section}=0, or {advice}"
    if why:
        raise RecipeError(f"{recipe.name}: {why}, and {checkpoint.path} is an ONNX graph, run forwards only; {advice}")


def _refuse_original_inputs(recipe: Recipe) -> None:
    """Refuses what needs the compressed blocks before one where it is given what the original's give."""
    if recipe.calibration.inputs == "prefix":
        return
    why, advice = "", ""
    if recipe.calibration.drift:
        why = "calibration.drift makes up for how far what the compressed blocks give is from that"
        advice = "calibration.drift: 0"
    elif recipe.learns_blocks is not None:
        why = f"steps of {recipe.learns_blocks.name} on blocks learn on what the compressed ones before give"
        advice = "no such steps"
    if why:
        raise RecipeError(
            f"{recipe.name}: calibration.inputs: original gives each block what the original's give, and {why}; write "
            f"{advice}, or calibration.inputs: prefix"
        )


def _refuse_two_norms(tensors: tuple[PlannedTensor, ...], recipe: Recipe) -> None:
    norms = {tensor.prune.gradient_norm for tensor in tensors if tensor.prune is not None} - {None}
    if len(norms) > 1:
        raise RecipeError(f"{recipe.name}: steps ask for gradients of p 1 and of p 2; one pass over them gives one p")


def _refuse_single_block(checkpoint: Checkpoint, recipe: Recipe) -> None:
    for step in recipe.passes:
        reason = step.settings.refuses_single_block if isinstance(step.settings, WeightSettings) else None
        if reason:
            raise RecipeError(f"{recipe.name}: {checkpoint.path}: {step.name}: {reason}")


def _refuse_unlearnable(tensors: tuple[PlannedTensor, ...], recipe: Recipe) -> None:
    """Refuses gradient steps over a matrix of whose encoding nothing learns: it would be left behind without a word."""
    fixed = next((tensor for tensor in tensors if tensor.method is not None and not tensor.spec.learns), None)
    if recipe.learns and fixed is not None:
        raise RecipeError(
            f"{recipe.name}: '{fixed.name}' is stored as {fixed.spec.kind}, which gradient steps cannot learn; found "
            f"{recipe.learns}; leave them out, or let another pass store it"
        )


def _is_float(info: TensorInfo) -> bool:
    """GGUF's own types (Q4_1 and so on) decode to floats as well."""
    return info.dtype in FLOATS or not re.fullmatch(r"BOOL|[IU]\d+", info.dtype)


def _recurrent(chosen: Chosen, recipe: Recipe, reason: str) -> tuple[Chosen, str]:
    """A matrix of a recurrent network is stored by passes that need nothing but its values, and is not pruned."""
    if chosen.method is None or chosen.method.trains or (chosen.prune and chosen.by == chosen.prune.name):
        return Chosen(), f"of a recurrent network, which {chosen.by or recipe.name} does not go through"
    return replace(chosen, prune=None), reason


def is_depthwise(shape: tuple[int, ...], role: Role, groups: int | None = None) -> bool:
    """A convolution with a kernel for each channel; where nobody says in how many groups it is, one of one input."""
    return role == "conv" and shape[1] == 1 and shape[0] > 1 and groups != 1


def _reason(info: TensorInfo, role: Role, smallest: int) -> str:
    if not _is_float(info):
        return "not of floating point"
    if len(info.shape) < 2:
        return "bias" if info.name.endswith("bias") else "norm or vector"
    if role == "other":
        return f"{len(info.shape)} dimensions: no layer that is known"
    if info.name.endswith("in_proj_weight"):
        return "joined projection of torch's MultiheadAttention: no layer of its own"
    if info.place == "elsewhere":
        return "no layer's weight: the network computes with it in a way of its own"
    if math.prod(info.shape) < smallest:
        return f"small: fewer than {smallest} weights"
    return ""


def _refuse_idle_patterns(checkpoint: Checkpoint, recipe: Recipe) -> None:
    names = list(checkpoint.tensors)
    for number, step in enumerate(recipe.passes, start=1):
        for key, patterns in (("select", step.select), ("skip", step.skip)):
            for pattern in patterns:
                one = step.model_copy(update={"select": (pattern,), "skip": ()})
                if not any(one.selects(name) for name in names):
                    example = next((name for name in names if block_of(name)), names[0] if names else "none")
                    raise RecipeError(
                        f"{recipe.name}, step {number} ({step.name}): {key} '{pattern}' matches none of "
                        f"{len(names)} tensors; names are like '{example}'"
                    )


def _files(checkpoint: Checkpoint, tensors: tuple[PlannedTensor, ...], format: str, static: bool) -> dict[str, int]:
    from compressor.onnx.file import OnnxSource

    kept = checkpoint.source.graph_bytes() if isinstance(checkpoint.source, OnnxSource) else None
    files = model_files(tensors, checkpoint.tied, format, static, kept)
    if checkpoint.reshaping is not None:
        files["structure.json"] = len(checkpoint.reshaping.text())
    if checkpoint.config is not None:
        files["configuration"] = CONFIG_BYTES
    files |= {path.name: copied_size(path) for path in checkpoint.tokenizer_files}
    return files


def _notes(has_blocks: bool) -> tuple[str, ...]:
    if has_blocks:
        return ()
    return ("no repeated block was found: the whole network is held in memory as one block",)


def _structure_notes(recipe: Recipe, tensors: tuple[PlannedTensor, ...]) -> tuple[str, ...]:
    """That sizes are bounds, since passes make the network smaller first, and what they will come to, about."""
    notes = [
        f"{step.name} leaves alone what reads the input, gives the output or lies alone on a shortcut, as the traced "
        "network has it: the sizes above are near what they will be"
        for step in recipe.early
        if step.settings.trains and step.settings.stage != "structure"
    ]
    for step in recipe.structure:
        settings = structure_settings(step)
        if settings.sizes:
            names = ", ".join(settings.sizes[:4]) + ", …" * (len(settings.sizes) > 4)
            others = "" if len(recipe.early) == 1 else "; the others' graphs, norms and biases come on top"
            notes.append(
                f"{step.name} puts smaller networks into it, {len(settings.sizes)} of them ({names}): the tensors "
                f"above are the largest's{others}"
            )
            continue
        what = f"removes {settings.removes:.0%} of the {settings.counts}"
        what = what if settings.chooses_units else "makes the network smaller"
        notes.append(f"{step.name} {what} first: the sizes above are upper bounds")
    left = smaller_bytes(recipe, tensors) if recipe.structure else None
    if left is not None:
        notes.append(f"its weights will take about {left / 1e6:,.1f} MB")
    return tuple(notes)
