"""How much a structure pass removes, where the caller says what is to be left: --target-flops, --target-size.

`--target-flops` is for the recipe's one pass that removes a share. So is `--target-size` where the recipe encodes
nothing; elsewhere it chooses widths, see `allocate`. From headers alone: no torch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from compressor.core.errors import UsageError
from compressor.core.options import RunOptions
from compressor.core.quantities import size
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Recipe, Step
from compressor.plan.sizes import is_buffer

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint

RECORD_BYTES = 50
"""Per tensor, about, of the file that says the new shapes."""
_MARGIN = 0.003
"""Of a size, for the graph, which headers tell only about."""


def aimed(options: RunOptions, recipe: Recipe, checkpoint: Checkpoint) -> tuple[RunOptions, Recipe]:
    """The recipe whose structure pass removes what the targets ask for, and the options without those targets.

    Raises:
        UsageError: No pass of the recipe removes a share, or none leaves such a size.
    """
    if options.target_flops is not None:
        step = _removing(recipe, "--target-flops")
        recipe = _with(recipe, step, {"of": "flops", "fraction": 1 - options.target_flops})
        options = replace(options, target_flops=None)
    if not recipe.structure or any(step.settings.stage == "weight" for step in recipe.passes):
        return options, recipe
    limits = {"max_loss": options.max_loss, "max_size": options.target_size}
    if options.target_size is not None:
        step = _removing(recipe, "--target-size")
        share = _fraction(options.target_size, step, recipe, checkpoint, options.format)
        recipe = _with(recipe, step, {"of": "parameters", "fraction": share})
    gates = recipe.gates.model_copy(update={name: limit for name, limit in limits.items() if limit is not None})
    return replace(options, target_size=None, max_loss=None), recipe.model_copy(update={"gates": gates})


def _removing(recipe: Recipe, option: str) -> Step:
    """The recipe's one step that removes a share."""
    steps = [step for step in recipe.passes if _removes_a_share(step)]
    if len(steps) != 1:
        found = f"{len(steps)} passes of {recipe.name} remove a share of the network"
        raise UsageError(f"{option}: {found}; give a recipe with one of lrp, hesso or oto, as cnn-explain")
    return steps[0]


def _with(recipe: Recipe, step: Step, changed: dict[str, object]) -> Recipe:
    """The recipe with other settings of one step."""
    settings = type(step.settings).model_validate(step.settings.model_dump(exclude_unset=True) | changed)
    other = step.model_copy(update={"settings": settings})
    return recipe.model_copy(update={"passes": tuple(other if each is step else each for each in recipe.passes)})


def _removes_a_share(step: Step) -> bool:
    return step.settings.stage == "structure" and {"of", "fraction"} <= set(type(step.settings).model_fields)


def _fraction(target: int, step: Step, recipe: Recipe, checkpoint: Checkpoint, format: str) -> float:
    """Of the parameters, to remove for all files to take `target` bytes, about and rather fewer."""
    plan = make_plan(checkpoint, recipe, format)
    parameters = [tensor for tensor in plan.tensors if not is_buffer(tensor.name)]
    n_bytes = sum(tensor.bytes_after for tensor in parameters)
    whole = plan.bytes_after + RECORD_BYTES * len(plan.tensors)
    surplus = whole - (1 - _MARGIN) * target
    if surplus <= 0:
        raise UsageError(
            f"--target-size: all files of {checkpoint.path} take about {size(whole)} as it is, and "
            f"{size(target)} is asked; give a smaller size, or --set {step.name}.fraction=…"
        )
    fraction = math.ceil(surplus / n_bytes * 1e4) / 1e4
    if fraction >= 1:
        raise UsageError(
            f"--target-size: {size(target)} leaves nothing of {checkpoint.path}: "
            f"{size(whole - n_bytes)} are not parameters; give a larger size"
        )
    return fraction
