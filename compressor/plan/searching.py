"""What a search for a fast network chooses, as far as headers tell: --target-latency, --target-speedup. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from compressor.core.errors import UsageError
from compressor.core.options import RunOptions
from compressor.core.passes import PruningSettings, WeightSettings
from compressor.passes.settings.sortednet import SortednetSettings
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.planning import on_floats
from compressor.plan.recipe import Recipe, Step

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint

FIRST, BATCH, MOST, PATIENCE = 10, 5, 60, 6
"""Networks that are measured to begin with, and at a time; how many at most; and batches without a better one after
which it ends."""
CONFIRMED = 5
"""Of the best, how often a network that turns out slower when it is measured anew gives way to the next."""
SECONDS = 12.0
"""To write, judge and measure a network, about."""


@dataclass(frozen=True)
class SearchSpace:
    """What is chosen from.

    over    sizes: how wide each group of units and how deep a sorted network is; layers: as the recipe stores each, or
            as floats, and some in 8 bits
    layers  names of those layers' weights
    wider   of some, what stores them in 8 bits
    narrow  of the others with fewer bits, why they are not stored so
    """

    over: Literal["sizes", "layers"]
    layers: tuple[str, ...] = ()
    wider: Mapping[str, WeightSettings] = field(default_factory=dict)
    narrow: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many choices each layer has."""
        return tuple(3 if name in self.wider else 2 for name in self.layers)

    def note(self, recipe: Recipe) -> str:
        """A sentence for the plan."""
        what = f"each of {len(self.layers)} layers as the recipe stores it or as floats"
        if self.wider:
            what += f", {len(self.wider)} of them in 8 bits as well"
        if self.narrow:
            (name, reason), others = next(iter(self.narrow.items())), len(self.narrow) - 1
            what += f" ('{name}'{f' and {others} more' if others else ''} not: {reason})"
        if self.over == "sizes":
            settings = _sorted(recipe)
            assert settings is not None
            what = f"{len(settings.widths)} widths for each group of units, {len(settings.depths)} depths"
        most = min(MOST, math.prod(self.counts)) if self.layers else MOST
        return (
            f"searches among {what}: up to {most} networks are written, judged and measured one at a time, the "
            f"original beside each; about {most * SECONDS / 60:.0f} min for a network of some milliseconds"
        )


InEight = Callable[[PlannedTensor], WeightSettings | str]
"""What stores a linear layer in 8 bits, or why nothing does."""


def search_space(
    recipe: Recipe, options: RunOptions, checkpoint: Checkpoint, plan: Plan, in_eight: InEight
) -> SearchSpace:  # fmt: skip
    """What there is to choose from.

    Raises:
        UsageError: Nothing is, or the search would not do with what else is asked; it says which.
    """
    option = "--target-latency" if options.target_latency is not None else "--target-speedup"
    wrong = _wrong(recipe, options, checkpoint)
    if wrong:
        raise UsageError(f"{option}: {wrong}")
    if _sorted(recipe) is not None:
        return SearchSpace("sizes")
    static = recipe.export.activations == "static_int8"
    same = on_floats(plan, checkpoint) if static else {}
    layers = tuple(t.name for t in plan.tensors if _is_chosen(t, static) and t.name not in same)
    if len(layers) < 2:
        others = ", ".join(dict.fromkeys(step.name for step in recipe.passes))
        raise UsageError(
            f"{option}: {recipe.name} leaves nothing to choose: it searches among the sizes of sortednet, and among "
            "layers as integers or as floats, linear layers, and convolutions with export.activations: static_int8; "
            f"found {others}, whose widths and depths are no choice of it"
        )
    linear = [tensor for tensor in plan.tensors if tensor.name in layers and tensor.role == "linear"]
    fewer = [tensor for tensor in linear if tensor.describe().get("bits") != 8]
    found = {tensor.name: _without_kernel(tensor, checkpoint) or in_eight(tensor) for tensor in fewer}
    wider = {name: method for name, method in found.items() if not isinstance(method, str)}
    return SearchSpace("layers", layers, wider, {name: why for name, why in found.items() if isinstance(why, str)})


def in_eight_bits(recipe: Recipe, wider: Mapping[str, WeightSettings]) -> Recipe:
    """The recipe that stores these layers in 8 bits: steps of their own, behind all others."""
    steps = tuple(
        Step(settings=settings, select=tuple(name for name, each in wider.items() if each == settings))
        for settings in dict.fromkeys(wider.values())
    )
    return recipe.model_copy(update={"passes": (*recipe.passes, *steps)})


def widened(recipe: Recipe, options: RunOptions) -> Recipe:
    """The recipe whose sorted network keeps every size, since the search begins with all of them."""
    if not options.searches:
        return recipe

    def kept(step: Step) -> Step:
        if not isinstance(step.settings, SortednetSettings):
            return step
        whole = SortednetSettings.model_validate(step.settings.model_dump(exclude_unset=True) | {"ship": None})
        return step.model_copy(update={"settings": whole})

    return recipe.model_copy(update={"passes": tuple(kept(step) for step in recipe.passes)})


def with_search(
    plan: Plan, recipe: Recipe, options: RunOptions, checkpoint: Checkpoint, in_eight: InEight
) -> Plan:  # fmt: skip
    """The plan with a note on what is searched, where something is.

    Raises:
        UsageError: As `searched`.
    """
    if not options.searches:
        if options.threads is not None or options.batch != 1:
            raise UsageError("--threads and --batch are of --target-latency and --target-speedup; give one of these")
        return plan
    space = search_space(recipe, options, checkpoint, plan, in_eight)
    return replace(plan, notes=(*plan.notes, space.note(recipe)))


def _wrong(recipe: Recipe, options: RunOptions, checkpoint: Checkpoint) -> str:
    """Why no network can be searched; empty where one can."""
    if find_spec("optuna") is None:
        return "needs optuna; pip install 'compressor[search]'"
    if options.target_latency is not None and options.target_speedup is not None:
        return "and --target-speedup are two targets; give one of them"
    if options.target_speedup is not None and not 1 < options.target_speedup < 1e3:
        return f"is {options.target_speedup:g}; write such as 2, times the original's speed"
    if not 1 <= options.batch <= 2**16:
        return f"--batch is {options.batch}; write 1 to {2**16}"
    if options.batch > 1 and (fixed := _of_fixed_batch(checkpoint, options.batch)):
        return f"--batch is {options.batch}, and {fixed}; leave --batch out"
    if options.format != "onnx":
        return "is measured in onnxruntime; leave --format safetensors out"
    if options.allocates or options.target_flops is not None:
        return "chooses the network, and so do --target-size, --target-flops and --max-loss; give one of them"
    if checkpoint.family == "decoder":
        return f"is of one run, and {checkpoint.architecture} writes tokens one at a time; give --set gates.min_speedup"
    if (checkpoint.config or {}).get("is_encoder_decoder"):
        return "is of one graph, and an encoder-decoder has two"
    if recipe.evaluation.skipped:
        return (
            "compares networks by quality, and evaluation is skipped; leave evaluation.tokens and samples as they are"
        )
    nested = _sorted(recipe)
    after = [step.name for step in recipe.passes if step.settings.stage != "structure"]
    if nested is not None and after:
        return (
            f"chooses sizes of sortednet before anything is encoded, and {recipe.name} has {after[0]} after it; "
            "leave that out, or compress what the search writes once more"
        )
    if recipe.learns:
        return f"measures many networks, and {recipe.learns} would train each of them; leave it out"
    dropping = next((step.name for step in recipe.passes if isinstance(step.settings, PruningSettings)), None)
    if dropping is not None and nested is None:
        return f"chooses layers that are stored as integers, and zeros of {dropping} make none faster"
    return ""


def _of_fixed_batch(checkpoint: Checkpoint, batch: int) -> str:
    """Which input of an ONNX graph takes another number of examples; empty where none does."""
    if checkpoint.kind != "onnx":
        return ""
    from compressor.onnx.file import OnnxSource

    assert isinstance(checkpoint.source, OnnxSource)
    for value in checkpoint.source.model.graph.inputs:
        first = next(iter(value.shape or ()), None)
        if isinstance(first, int) and first != batch:
            return f"'{value.name}' of {checkpoint.path} takes {first} at a time"
    return ""


def _sorted(recipe: Recipe) -> SortednetSettings | None:
    found = [step.settings for step in recipe.structure if isinstance(step.settings, SortednetSettings)]
    return found[0] if found else None


def _without_kernel(tensor: PlannedTensor, checkpoint: Checkpoint) -> str:
    """Why no kernel takes the codes of a layer; empty where one does."""
    info = checkpoint.tensors.get(tensor.name)
    return "of a recurrent network, which computes on floats" if info and info.place == "recurrent" else ""


def _is_chosen(tensor: PlannedTensor, static: bool) -> bool:
    """Whether how it is stored changes how it is computed."""
    return bool(tensor.by) and (tensor.role == "linear" or (static and tensor.role == "conv"))
