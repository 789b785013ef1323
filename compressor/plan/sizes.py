"""What an artifact and its making will take, in bytes and CPU-seconds, from shapes alone; memory is `plan.memory`'s."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from compressor.core.machine import multiplies_bfloat16
from compressor.core.packed import StoredPart, packed_header
from compressor.core.passes import StructureSettings
from compressor.core.roles import block_of
from compressor.core.spec import DenseSpec
from compressor.core.training import Training
from compressor.plan.plan import PlannedTensor
from compressor.plan.recipe import TOKENS_PER_BATCH, Recipe, Step
from compressor.plan.workload import Workload

FLOPS = 90e9
"""Multiplications and additions per CPU-second of a forward pass, measured on SmolLM2-135M."""
SECONDS_PER_WEIGHT = 1.0e-6
"""CPU-seconds to assign codes to a weight, about."""
SECONDS_PER_CODEWORD = 6e-10
"""CPU-seconds to compare a weight with a codeword, of those that `WeightSettings.compared` counts, about."""
SECONDS_PER_STEP = 2e-8
"""CPU-seconds to decode a weight and learn what it is made of, about, in a step of the distillation."""
FIXED = 1.5
"""CPU-seconds of a run on arrays that are none of the examples': export, proof, reading."""
TORCH, ONNXRUNTIME, ROUNDED = (5e-11, 8e-9), (2.5e-11, 1e-8), (3e-11, 1.5e-8)
"""CPU-seconds for a product and for a number that a layer writes, with what lies between layers: of a convolutional
network in torch, in onnxruntime, and there with its activations rounded; measured on six networks (docs/runtime.md)."""
SECONDS_PER_RANGED = 3e-8
"""To see what ranges a number needs, of each that a layer writes."""
TRIALS, MANY_LAYERS = 80, 48
"""Forwards on which ranges are chosen, about, of a network of many layers; fewer have fewer groups of them."""
GRAPH_BYTES_PER_PART = 420
GRAPH_BYTES_PER_CONVOLUTION = 1500


def model_files(
    tensors: tuple[PlannedTensor, ...], tied: dict[str, str], format: str, static: bool, kept: int | None = None
) -> dict[str, int]:  # fmt: skip
    """Bytes of the weights' file, exact, and of the graph, about: `kept` of it are an original graph's own."""
    files = {"model.safetensors": weights_bytes(tensors, tied)}
    if format == "onnx":
        files["model.onnx"] = graph_file_bytes(tensors, static, kept)
    return files


def weights_bytes(
    tensors: tuple[PlannedTensor, ...], tied: dict[str, str], own: tuple[PlannedTensor, ...] = ()
) -> int:  # fmt: skip
    """Bytes of the weights' file, exact; `own` are tensors that only networks of other sizes have."""
    stored, names = (*tensors, *own), [tensor.name for tensor in own]
    header = len(packed_header(described(stored), stored_parts(stored), tied, names)[0])
    return header + sum(tensor.bytes_after for tensor in stored)


def graph_file_bytes(tensors: Iterable[PlannedTensor], static: bool, kept: int | None = None) -> int:
    """Bytes of a graph over these tensors, about: `kept` of it are an original graph's own."""
    tensors = tuple(tensors)
    norms = batch_norms(tensors)
    there = [tensor for tensor in tensors if tensor.name.rpartition(".")[0] not in norms]
    own = (2_000 if static else 20_000) if kept is None else kept + (2_000 if static else 6_000)
    return own + sum(graph_bytes(tensor, static) for tensor in there)


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
    return len(packed_header(described(tensors), stored_parts(tensors), tied)[0])


def described(tensors: tuple[PlannedTensor, ...]) -> dict[str, dict[str, Any]]:
    """What the file will say of tensors by name."""
    return {
        tensor.name: {
            **tensor.describe(), "tensor_shape": list(tensor.shape),
            "transposed": tensor.transposed and bool(tensor.by), "parts": sorted(tensor.spec.parts(*tensor.matrix)),
        }
        for tensor in tensors
    }  # fmt: skip


def stored_parts(tensors: tuple[PlannedTensor, ...]) -> dict[tuple[str, str], StoredPart]:
    """The parts that tensors will have, by (tensor, part)."""
    return {
        (tensor.name, part): StoredPart(dtype, shape, DenseSpec(dtype=dtype).nbytes(1, math.prod(shape)))
        for tensor in tensors
        for part, (dtype, shape) in tensor.spec.parts(*tensor.matrix).items()
    }


def _weights(tensors: tuple[PlannedTensor, ...]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors if tensor.role in ("linear", "conv"))


def cpu_seconds(tensors: tuple[PlannedTensor, ...], recipe: Recipe, load: Workload | None = None) -> float:
    """Of a whole run but for timing the result, about; of networks that read text without export and evaluation."""
    n_weights, tokens, distill = _weights(tensors), recipe.calibration.tokens, recipe.distill
    tables = sum(math.prod(tensor.shape) for tensor in tensors if tensor.role == "embedding")
    passes = sum(step.settings.cost(tokens) for step in recipe.passes) + 3 * ("gradients" in recipe.required)
    passes += 3 * recipe.corrects_drift
    found = n_weights * SECONDS_PER_WEIGHT + sum(_search_seconds(tensor) for tensor in tensors)
    if load is not None and load.layers:
        found += _seconds_of_arrays(recipe, load)
    else:
        trained = sum(each.tokens_tried + each.forwards_trained(tokens) for each in _trainings(recipe))
        found += 2 * n_weights * (tokens * passes + trained) / FLOPS + 5
    if distill.steps:
        rate = FLOPS * (2 if multiplies_bfloat16() else 1)
        learned = 2 * (n_weights + tables) * (distill.tokens + 3 * distill.steps * TOKENS_PER_BATCH) / rate
        found += learned + distill.steps * (n_weights + tables) * SECONDS_PER_STEP
    return round(found, 1)


def _search_seconds(tensor: PlannedTensor) -> float:
    """To compare a matrix's weights with codewords."""
    if tensor.method is None:
        return 0.0
    return math.prod(tensor.matrix) * tensor.method.compared(tensor.matrix) * SECONDS_PER_CODEWORD


def _seconds_of_arrays(recipe: Recipe, load: Workload) -> float:
    """A run on arrays, export and evaluation with it: forwards of torch and of onnxruntime, and what passes do.

    A network without blocks is run from its start for every layer whose inputs a pass asks for: half of it on average.
    """
    n, settings = load.n_calibration, [step.settings for step in recipe.passes]
    forwards = 3 * ("gradients" in recipe.required) + 2 * recipe.calibration.correct_means
    gathers = any("data" in each.needs for each in settings)
    forwards += gathers * load.n_layers / 2
    learned = sum(
        2 * layer.products * n * each.cost(max(1, layer.positions * n))
        for each in settings if "data" in each.needs for layer in load.layers
    )  # fmt: skip
    trained = sum(each.forwards_trained(load.n_trained) for each in _trainings(recipe))
    moments = gathers * n * sum(layer.positions * layer.columns**2 for layer in load.layers)
    found = FIXED + (n * forwards + trained) * load.seconds(TORCH) + (learned + moments) / FLOPS
    if recipe.export.activations == "static_int8":
        trials = TRIALS * min(1.0, load.n_layers / MANY_LAYERS)
        found += 1 + n * load.written * SECONDS_PER_RANGED + trials * load.seconds(ROUNDED)
    return found + 2 * load.n_evaluation * load.seconds(ONNXRUNTIME)


def _trainings(recipe: Recipe) -> list[Training]:
    """Settings of the passes that train."""
    return [step.settings for step in recipe.passes if isinstance(step.settings, Training)]


def structure_settings(step: Step) -> StructureSettings:
    """Of a structure pass."""
    assert isinstance(step.settings, StructureSettings)
    return step.settings


def smaller_bytes(recipe: Recipe, tensors: tuple[PlannedTensor, ...]) -> int | None:
    """Bytes of the weights once structure passes are done, about; None where their budget does not say.

    Parameters go from the matrices outside of tables that a step is for, alike from all; a share of the units is that
    share of them, where each kind of unit loses it.
    """
    kept = {tensor.name: 1.0 for tensor in tensors}
    for step in recipe.structure:
        settings = structure_settings(step)
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
