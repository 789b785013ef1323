"""What several sizes in one artifact cannot go through: refused from the recipe alone, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.checkpoints import Checkpoint
from compressor.core.errors import RecipeError
from compressor.core.options import RunOptions
from compressor.core.passes import PruningSettings, StructureSettings, WeightSettings
from compressor.plan.recipe import Recipe


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
