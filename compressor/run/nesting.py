"""What several sizes in one artifact cannot go through, refused in the plan: from the recipe alone, and by the shapes
that the sizes will have; and the bytes that they will take beside the largest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints import Checkpoint
from compressor.core.errors import RecipeError
from compressor.core.options import RunOptions
from compressor.core.passes import PruningSettings, StructureSettings, WeightSettings
from compressor.core.sizes import RECORD, graph_name, own_name
from compressor.core.spec import ITEM_SIZE, DenseSpec
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.recipe import SHORTEST_WINDOW, Recipe, Step
from compressor.plan.sizes import graph_file_bytes, weights_bytes

if TYPE_CHECKING:
    from compressor.core.batch import Batch
    from compressor.core.nested import Foretold
    from compressor.data.samples import Samples

_DESCRIBED = 600
"""Bytes of a size in sizes.json beside the names and shapes of its tensors: facts, quality, speed, about."""
_RESIZED = 30
"""Bytes there of an attribute that follows a tensor's shape, about."""
_CUT = 250
"""Bytes that a cut takes in a graph, about."""


def refuse_sizes(recipe: Recipe, options: RunOptions, checkpoint: Checkpoint) -> None:
    """Refuses what networks of several sizes in one artifact cannot go through.

    Raises:
        RecipeError: What it is, and what to write instead.
    """
    nested = [step for step in recipe.structure if isinstance(step.settings, StructureSettings) and step.settings.sizes]
    if not nested:
        return
    name = nested[0].name
    wrong = None
    if recipe.early[-1] is not nested[0] or len(nested) > 1:
        wrong = "the sizes would no longer be in what comes after it; let it be the last pass that changes the network"
    elif options.format != "onnx" or options.mode == "standard":
        given = "--standard writes weights of its own" if options.mode == "standard" else f"--format {options.format}"
        wrong = f"every size is a graph over the same weights, and {given}; leave that out"
    elif options.allocates:
        wrong = "a target is of one network, and its widths are no other size's; leave --target-size and --max-loss out"
    elif (checkpoint.config or {}).get("is_encoder_decoder"):
        wrong = (
            "an encoder-decoder has a graph for each of its parts; give an encoder, a decoder or a network of arrays"
        )
    elif recipe.learns:
        wrong = f"what is learned after it would be the largest size's alone; found {recipe.learns}; leave it out"
    elif recipe.calibration.correct_means or recipe.corrects_drift:
        key = "correct_means" if recipe.calibration.correct_means else "drift"
        wrong = f"calibration.{key} would change the largest size alone; write --set calibration.{key}=" + (
            "false" if key == "correct_means" else "0"
        )
    else:
        wrong = _refused_encoding(recipe, nested[0].settings.model_dump())
    if wrong:
        raise RecipeError(f"{recipe.name}: {name} makes several sizes of one network: {wrong}")


def _refused_encoding(recipe: Recipe, settings: Mapping[str, Any]) -> str | None:
    """Why what follows does not store the beginnings of matrices as matrices of their own."""
    for step in recipe.passes:
        if isinstance(step.settings, PruningSettings):
            return f"{step.name} drops weights by what the whole matrix computes; leave it out"
        if not isinstance(step.settings, WeightSettings) or not settings.get("widths") or len(settings["widths"]) == 1:
            continue
        if not step.settings.encodes_beginnings:
            advice = "write affine with method: rtn or hqq"
            return f"{step.name} stores a matrix as a whole, and a smaller size could not share it; {advice}"
        group = getattr(step.settings, "group", "row")
        if isinstance(group, int) and settings["multiple"] % group:
            return f"its widths are multiples of {settings['multiple']}, and {step.name} stores groups of {group}; " + (
                f"write multiple: {group}, or group: row"
            )
    return None


def with_sizes(
    plan: Plan, recipe: Recipe, options: RunOptions, checkpoint: Checkpoint, samples: Samples | None
) -> Plan:  # fmt: skip
    """The plan with what the smaller networks in one artifact take, where there are some.

    Where blocks go by what the outputs lose it is as if the last ones went, and what a size might have in common with
    the largest by chance counts as its own.

    Raises:
        CheckpointError: The network is none that a pass could make sizes of.
        RecipeError: Two sizes are the same, or one ends within what is stored as a whole.
    """
    step = next((step for step in recipe.structure if _makes_sizes(step)), None)
    if step is None or recipe.early != (step,):
        return plan  # of a network that other passes change first nothing is known yet
    from compressor.structure.stage import without_weights

    method, subject = without_weights(checkpoint, step, example_of(recipe, options, samples))
    sizes = method.foretell(subject)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    for size in sizes:
        for name, (stored, shape) in size.held.items():
            tensor = planned.get(stored)
            reason = "" if tensor is None or name in size.own else _indivisible(tensor, shape)
            if reason:
                raise RecipeError(
                    f"{recipe.name}: {step.name}: size {size.name} cannot share '{stored}': {reason}; write another "
                    "multiple or group, or other heads"
                )
    return plan if options.searches else replace(plan, files=_files(plan, recipe, checkpoint, sizes, planned))


def _makes_sizes(step: Step) -> bool:
    return isinstance(step.settings, StructureSettings) and bool(step.settings.sizes)


def example_of(recipe: Recipe, options: RunOptions, samples: Samples | None) -> Batch:
    """What the network is traced on: of a text any tokens will do."""
    import torch

    from compressor.data.arrays import Arrays
    from compressor.data.batches import calibration_batches

    source = None if samples is None else samples.calibration
    if not isinstance(source, Arrays):
        return {"input_ids": torch.ones(2, SHORTEST_WINDOW, dtype=torch.int64)}
    batch = calibration_batches(source, recipe, Path(), options.seed)[0]
    return {name: tensor[:2] for name, tensor in batch.items()}


def _indivisible(tensor: PlannedTensor, shape: Sequence[int]) -> str:
    """Why the beginning of this shape of a tensor is no encoding of its own; empty where it is."""
    columns = shape[0] if tensor.transposed and tensor.by else math.prod(shape[1:])
    return tensor.spec.indivisible(tensor.matrix[1], columns)


def _files(
    plan: Plan, recipe: Recipe, checkpoint: Checkpoint, sizes: Sequence[Foretold],
    planned: Mapping[str, PlannedTensor],
) -> dict[str, int]:  # fmt: skip
    """The bytes of all files, those of the sizes with them."""
    static = recipe.export.activations == "static_int8"
    own = tuple(tensor for size in sizes for tensor in _own(size, recipe, planned))
    files = {"model.safetensors": weights_bytes(plan.tensors, plan.tied, own)}
    files["model.onnx"] = plan.files["model.onnx"]
    said, config = 0, 0 if checkpoint.config is None else len(json.dumps(checkpoint.config))
    for size in sizes:
        there = {name: planned[stored] for name, (stored, _) in size.held.items() if stored in planned}
        cut = {
            name: (stored, shape)
            for name, (stored, shape) in size.held.items()
            if name in there and name not in size.own and (shape != there[name].shape or name != stored)
        }
        narrower = sum(1 for name, (_, shape) in cut.items() if shape[1:] != there[name].shape[1:])
        graph = graph_file_bytes((replace(tensor, name=name) for name, tensor in there.items()), static)
        files[graph_name(size.name)] = graph + _CUT * narrower
        shapes = {name: (shape, there[name].shape) for name, (_, shape) in size.held.items() if name in there}
        changed = {name: each for name, each in shapes.items() if each[0] != each[1]}
        listed = [cut, sorted(size.own & there.keys()), changed, sorted(planned.keys() - there.keys())]
        said += _DESCRIBED + len(json.dumps(listed, separators=(",", ":"))) + _RESIZED * len(changed) + config
    files[RECORD] = said + _DESCRIBED
    return files | {name: size for name, size in plan.files.items() if name not in files}


def _own(size: Foretold, recipe: Recipe, planned: Mapping[str, PlannedTensor]) -> Iterator[PlannedTensor]:
    """What a size will have for itself, as it will be stored."""
    for name, (stored, shape) in size.held.items():
        tensor = planned.get(stored)
        if tensor is None or name not in size.own:
            continue
        matrix = (shape[0] if shape else 1, math.prod(shape[1:]))
        spec = DenseSpec(dtype=recipe.export.dense.replace("float", "F"))
        before = math.prod(shape) * ITEM_SIZE["F32"]
        yield PlannedTensor(own_name(name, size.name), shape, "other", matrix, before, spec)
