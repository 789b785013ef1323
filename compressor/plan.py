"""What a recipe will do with a checkpoint, from headers alone: bytes per tensor and file, memory, time, and what stays.

No torch. The weights' bytes are exact, as is the header of model.safetensors; the graph, memory and time are estimates.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from compressor.checkpoints.tokenizer import copied_size
from compressor.core.errors import RecipeError
from compressor.core.passes import Pass, Role, StructurePass
from compressor.core.roles import block_of, is_transposed, matrix_shape, role_of
from compressor.core.spec import DenseSpec, Spec, sparse_spec
from compressor.footprint import multiplies_bfloat16, peak_memory
from compressor.recipe import TOKENS_PER_BATCH, Chosen, Recipe, Step

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint, TensorInfo

FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
FLOPS = 90e9
"""Multiplications and additions per CPU-second of a forward pass, measured on SmolLM2-135M."""
SECONDS_PER_WEIGHT = 1.0e-6
"""CPU-seconds to assign codes to a weight, about."""
SECONDS_PER_STEP = 2e-8
"""CPU-seconds to decode a weight and learn what it is made of, about, in a step of the distillation."""
GRAPH_BYTES_PER_PART = 420
GRAPH_BYTES_PER_CONVOLUTION = 1500
CONFIG_BYTES = 4096
_ALIGNMENT = 64


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor: what it is, how it will be stored and by which passes, or why it stays as it is.

    `by` names what chose the encoding, `method` is the pass that makes it, after `prune` if there is one.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    matrix: tuple[int, int]
    bytes_before: int
    spec: Spec
    by: str = ""
    reason: str = ""
    transposed: bool = False
    method: Pass | None = None
    prune: Pass | None = None

    @property
    def bytes_after(self) -> int:
        return self.spec.nbytes(*self.matrix)

    def describe(self) -> dict[str, Any]:
        """The description of its encoding, as exporters take it."""
        return self.spec.describe(*self.matrix)

    def as_json(self) -> dict[str, Any]:
        encoding = {key: value for key, value in self.describe().items() if key not in ("shape", "counts")}
        return {
            "name": self.name, "shape": list(self.shape), "role": self.role, "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after, "encoding": encoding, "by": self.by or None, "reason": self.reason or None,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The tensors in order, the artifact's files, and what it takes to make them."""

    model: str
    architecture: str
    recipe: str
    tensors: tuple[PlannedTensor, ...]
    tied: dict[str, str]
    files: dict[str, int]
    needs: tuple[str, ...]
    peak_memory: int
    cpu_seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes_before(self) -> int:
        return sum(tensor.bytes_before for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Of every file that running the artifact needs."""
        return sum(self.files.values())

    @property
    def pruned(self) -> frozenset[str]:
        """The names of the tensors that lose weights."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.prune is not None)

    @property
    def gradient_norm(self) -> Literal[1, 2] | None:
        """The p of the weights' gradients that the passes which drop weights ask for, if any does."""
        norms = (tensor.prune.gradient_norm for tensor in self.tensors if tensor.prune is not None)
        return next((norm for norm in norms if norm is not None), None)

    def as_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in asdict(self).items() if key != "tensors"}
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return plain | totals | {"tensors": [tensor.as_json() for tensor in self.tensors]}


def make_plan(checkpoint: Checkpoint, recipe: Recipe, format: str = "onnx", smaller: bool = False) -> Plan:
    """What `recipe` will do with `checkpoint`; `smaller` is one that its structure passes are done with.

    Raises:
        RecipeError: A pattern selects nothing, or no tensor would be encoded.
    """
    _refuse_idle_patterns(checkpoint, recipe)
    if checkpoint.kind == "onnx":
        _refuse_gradients(checkpoint, recipe)
    config = checkpoint.config or {}
    if not smaller:
        for step in recipe.early:
            if step.settings.trains:
                recipe = recipe.leaving(step.name, _likely_ends(checkpoint))
    has_blocks = any(block_of(name) for name in checkpoint.tensors)
    tensors = tuple(_planned(info, config, recipe, format, has_blocks) for info in checkpoint.tensors.values())
    _refuse_two_norms(tensors, recipe)
    if not has_blocks and any(getattr(step.settings, "unit", "layer") == "block" for step in recipe.passes):
        raise RecipeError(
            f"{recipe.name}: unit is block, but {checkpoint.path} has no repeated blocks; write unit: layer"
        )
    if not any(tensor.by for tensor in tensors) and not recipe.early:
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
        peak_memory=peak_memory(tensors, config, recipe),
        cpu_seconds=_cpu_seconds(tensors, recipe),
        notes=_notes(tensors) + (() if smaller else _structure_notes(recipe, tensors)),
    )


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
    matrix = info.shape[::-1] if info.transposed else matrix_shape(info.name, info.shape, config)
    transposed = info.transposed or (is_transposed(info.name, config) and role == "linear")
    reason = _reason(info, role, recipe.smallest(role))
    depthwise = is_depthwise(info, role)
    chosen = Chosen() if reason else recipe.choose(info.name, matrix, role, depthwise)
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


def _refuse_two_norms(tensors: tuple[PlannedTensor, ...], recipe: Recipe) -> None:
    norms = {tensor.prune.gradient_norm for tensor in tensors if tensor.prune is not None} - {None}
    if len(norms) > 1:
        raise RecipeError(f"{recipe.name}: steps ask for gradients of p 1 and of p 2; one pass over them gives one p")


def _is_float(info: TensorInfo) -> bool:
    """GGUF's own types (Q4_1 and so on) decode to floats as well."""
    return info.dtype in FLOATS or not re.fullmatch(r"BOOL|[IU]\d+", info.dtype)


def is_depthwise(info: TensorInfo, role: Role) -> bool:
    return role == "conv" and info.shape[1] == 1 and info.shape[0] > 1


def _reason(info: TensorInfo, role: Role, smallest: int) -> str:
    if not _is_float(info):
        return "not of floating point"
    if len(info.shape) < 2:
        return "bias" if info.name.endswith("bias") else "norm or vector"
    if role == "other":
        return f"{len(info.shape)} dimensions: no layer that is known"
    if info.name.endswith("in_proj_weight"):
        return "joined projection of torch's MultiheadAttention: no layer of its own"
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
    files = model_files(tensors, checkpoint.tied, format, static)
    if checkpoint.reshaping is not None:
        files["structure.json"] = len(checkpoint.reshaping.text())
    if checkpoint.config is not None:
        files["configuration"] = CONFIG_BYTES
    files |= {path.name: copied_size(path) for path in checkpoint.tokenizer_files}
    return files


def model_files(
    tensors: tuple[PlannedTensor, ...], tied: dict[str, str], format: str, static: bool
) -> dict[str, int]:  # fmt: skip
    """Bytes of the weights' file, exact, and of the graph, about."""
    header = header_bytes(tensors, tied)
    files = {"model.safetensors": header + sum(tensor.bytes_after for tensor in tensors)}
    if format == "onnx":
        norms = batch_norms(tensors)
        there = [tensor for tensor in tensors if tensor.name.rpartition(".")[0] not in norms]
        files["model.onnx"] = (2_000 if static else 20_000) + sum(graph_bytes(tensor, static) for tensor in there)
    return files


def batch_norms(tensors: tuple[PlannedTensor, ...]) -> frozenset[str]:
    """The modules whose tensors the graph folds into the convolutions before them, as a rule."""
    means = (tensor.name for tensor in tensors if tensor.name.endswith(".running_mean"))
    return frozenset(name.removesuffix(".running_mean") for name in means)


def is_buffer(name: str) -> bool:
    """Whether the tensor is a batch norm's statistics and no parameter."""
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def graph_bytes(tensor: PlannedTensor, static: bool) -> int:
    """Of its share in the graph. Convolutions on int8 hold a scale and a bias for each channel in it; norms fold."""
    if not static or tensor.role == "linear":
        return GRAPH_BYTES_PER_PART * len(tensor.spec.parts(*tensor.matrix))
    return GRAPH_BYTES_PER_CONVOLUTION + 8 * tensor.matrix[0] if tensor.by else 0


def header_bytes(tensors: tuple[PlannedTensor, ...], tied: dict[str, str]) -> int:
    """Bytes before the first tensor in the safetensors file that `core.tensors.write_tensors` makes."""
    header: dict[str, Any] = {}
    descriptions: dict[str, Any] = {}
    position = 0
    for tensor in tensors:
        parts = tensor.spec.parts(*tensor.matrix)
        descriptions[tensor.name] = {
            **tensor.describe(), "tensor_shape": list(tensor.shape),
            "transposed": tensor.transposed and bool(tensor.by), "parts": sorted(parts),
        }  # fmt: skip
        for part in sorted(parts):
            dtype, shape = parts[part]
            size = DenseSpec(dtype=dtype).nbytes(1, math.prod(shape))
            name = tensor.name if part == "weight" else f"{tensor.name}.{part}"
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
    metadata = json.dumps({"tensors": descriptions, "tied": tied}, separators=(",", ":"))
    text = json.dumps({"__metadata__": {"compressor": metadata}, **header}, separators=(",", ":")).encode()
    return -(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT


def _weights(tensors: tuple[PlannedTensor, ...]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors if tensor.role in ("linear", "conv"))


def _cpu_seconds(tensors: tuple[PlannedTensor, ...], recipe: Recipe) -> float:
    n_weights, tokens, distill = _weights(tensors), recipe.calibration.tokens, recipe.distill
    tables = sum(math.prod(tensor.shape) for tensor in tensors if tensor.role == "embedding")
    passes = sum(step.settings.cost(tokens) for step in recipe.passes) + 3 * ("gradients" in recipe.required)
    found = 2 * n_weights * tokens * passes / FLOPS + n_weights * SECONDS_PER_WEIGHT + 5
    if distill.steps:
        rate = FLOPS * (2 if multiplies_bfloat16() else 1)
        learned = 2 * (n_weights + tables) * (distill.tokens + 3 * distill.steps * TOKENS_PER_BATCH) / rate
        found += learned + distill.steps * (n_weights + tables) * SECONDS_PER_STEP
    return round(found, 1)


def _notes(tensors: tuple[PlannedTensor, ...]) -> tuple[str, ...]:
    if any(block_of(tensor.name) for tensor in tensors):
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
        settings = _settings(step)
        what = f"removes {settings.removes:.0%} of the {getattr(settings, 'of', 'units')}"
        what = what if settings.chooses_units else "makes the network smaller"
        notes.append(f"{step.name} {what} first: the sizes above are upper bounds")
    left = smaller_bytes(recipe, tensors) if recipe.structure else None
    if left is not None:
        notes.append(f"its weights will take about {left / 1e6:,.1f} MB")
    return tuple(notes)


def _settings(step: Step) -> StructurePass:
    assert isinstance(step.settings, StructurePass)
    return step.settings


def smaller_bytes(recipe: Recipe, tensors: tuple[PlannedTensor, ...]) -> int | None:
    """Bytes of the weights once structure passes are done, about; None where their budget does not say.

    Parameters go from the matrices outside of tables that a step is for, alike from all; a share of the units is that
    share of them, where each kind of unit loses it.
    """
    kept = {tensor.name: 1.0 for tensor in tensors}
    for step in recipe.structure:
        settings = _settings(step)
        mine = [t for t in tensors if t.role in ("linear", "conv") and step.selects(t.name)]
        if settings.removes_exactly:
            whole = sum(kept[t.name] * math.prod(t.shape) for t in tensors)
            share = settings.removes * whole / max(1.0, sum(kept[t.name] * math.prod(t.shape) for t in mine))
        elif settings.removes_evenly:
            share, mine = settings.removes, [t for t in mine if block_of(t.name)]
        else:
            return None
        for tensor in mine:
            kept[tensor.name] *= max(0.0, 1 - share)
    return round(sum(kept[tensor.name] * tensor.bytes_after for tensor in tensors))
