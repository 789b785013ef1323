"""The widths that each planned tensor may have instead, and plans that differ in them. From headers alone: no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from compressor.core.errors import UsageError
from compressor.core.passes import WeightSettings
from compressor.core.spec import AffineSpec, SparseSpec, Spec, sparse_spec
from compressor.export.forms import Mode, refusal
from compressor.plan.plan import Plan, PlannedTensor
from compressor.plan.planning import is_depthwise
from compressor.plan.recipe import Recipe
from compressor.plan.sizes import graph_bytes, header_bytes, model_files


@dataclass(frozen=True)
class Option:
    """One way to store a tensor: the pass, the encoding, and its bytes in the weights' file and the graph."""

    method: WeightSettings
    spec: Spec
    nbytes: int


Options = dict[str, tuple[Option, ...]]
"""Name of a tensor -> its options, smallest first; of tensors that a pass encodes."""


@dataclass(frozen=True)
class Ladder:
    """A plan and what else its tensors may be."""

    plan: Plan
    recipe: Recipe
    format: str
    mode: Mode
    options: Options

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe, format: str, mode: Mode) -> Ladder:
        """Every option that the format holds."""
        options = {
            tensor.name: _options(tensor, recipe, format, mode) for tensor in plan.tensors if tensor.method is not None
        }
        return cls(plan, recipe, format, mode, options)

    def numbered(self, chosen: Mapping[str, int]) -> dict[str, Option]:
        """The options of these numbers, by tensor."""
        return {name: self.options[name][at] for name, at in chosen.items()}

    def plan_of(self, chosen: Mapping[str, Option]) -> Plan:
        """The plan with these options instead, its files' bytes counted again."""
        tensors = tuple(
            _with(tensor, chosen[tensor.name]) if tensor.name in chosen else tensor for tensor in self.plan.tensors
        )
        static = self.recipe.export.activations == "static_int8"
        files = self.plan.files | model_files(tensors, self.plan.tied, self.format, static)
        return replace(self.plan, tensors=tensors, files=files)

    def reach(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest artifact."""
        smallest, largest = self.ends()
        return smallest.bytes_after, largest.bytes_after

    def ends(self) -> tuple[Plan, Plan]:
        """The plans of the smallest and of the largest options."""
        smallest, largest = (
            self.plan_of({name: options[at] for name, options in self.options.items()}) for at in (0, -1)
        )
        return smallest, largest

    def refuse_unreachable(self, target: int, weigh: Callable[[Plan], int] | None = None) -> None:
        """Raises UsageError where no choice of widths comes within 1 % below `target` bytes.

        Without `weigh`, which tells a plan's bytes exactly, only where it is certain: the graph's bytes are estimated.
        """
        ends = self.ends()
        smallest, largest = (plan.bytes_after if weigh is None else weigh(plan) for plan in ends)
        graph = 0 if weigh else ends[0].files.get("model.onnx", 0)
        if smallest - graph <= target and largest + graph >= 0.99 * target:
            return
        raise UsageError(
            f"--target-size: {self.plan.recipe} brings {self.plan.model} to {smallest / 1e6:,.3g} … "
            f"{largest / 1e6:,.3g} MB{'' if weigh else ', about'}, every file counted; found {target / 1e6:,.3g} MB; "
            "give a size in this range, or another recipe"
        )

    def is_certain(self, target: int) -> bool:
        """Whether `target` lies well within the range, however many bytes the graph takes."""
        (smallest, largest), graph = self.reach(), self.plan.files.get("model.onnx", 0)
        return smallest + graph <= target <= largest - 2 * graph


def in_eight_bits(tensor: PlannedTensor, recipe: Recipe, format: str, mode: Mode) -> WeightSettings | str:
    """The pass of a linear layer as it would store it in 8 bits, in groups as near to its own as a kernel takes; or why
    that is no choice."""
    own = tensor.spec
    if tensor.method is None or not isinstance(own, AffineSpec):
        return f"is stored as {own.kind}, whose codes have no number of bits to set"
    if own.bits == 8:
        return "has 8 bits as the recipe stores it"
    specs = [(method, method.spec_for(tensor.name, tensor.matrix, "linear")) for method in tensor.method.ladder()]
    wider = [(method, spec) for method, spec in specs if isinstance(spec, AffineSpec) and spec.bits == 8]
    wider.sort(key=lambda each: each[1].group != own.group)  # of the others, the order is the ladder's
    for method, spec in wider:
        if _fits(tensor, spec, format, mode) and _goes_along(tensor, method, spec, recipe):
            return method
    why = next((refusal(spec.describe(*tensor.matrix), "matmul", mode) for _, spec in wider), None)
    return f"{why or 'it would be no smaller than floats'}" if wider else f"{tensor.by}, as it is set, has no 8 bits"


def _options(tensor: PlannedTensor, recipe: Recipe, format: str, mode: Mode) -> tuple[Option, ...]:
    assert tensor.method is not None
    static = recipe.export.activations == "static_int8"
    keeps = static and tensor.role == "conv"
    found: dict[str, Option] = {}
    for method in (tensor.method,) if keeps else tensor.method.ladder():
        spec = _spec(tensor, method, format)
        if spec is None or not _fits(tensor, spec, format, mode) or not _goes_along(tensor, method, spec, recipe):
            continue
        option = Option(method, spec, _nbytes(replace(tensor, spec=spec), static, format))
        found.setdefault(str(spec.parts(*tensor.matrix)) + str(spec.describe(*tensor.matrix)), option)
    if not found:
        return (Option(tensor.method, tensor.spec, _nbytes(tensor, static, format)),)
    return tuple(sorted(found.values(), key=lambda option: option.nbytes))


def _spec(tensor: PlannedTensor, method: WeightSettings, format: str) -> Spec | None:
    spec = method.spec_for(tensor.name, tensor.matrix, "linear" if tensor.role == "embedding" else tensor.role)
    if spec is not None and tensor.prune is not None and format == "safetensors":
        return sparse_spec(spec, *tensor.matrix, tensor.prune.kept(*tensor.matrix))
    return spec


def _fits(tensor: PlannedTensor, spec: Spec, format: str, mode: Mode) -> bool:
    """Whether the encoding is smaller than floats, and onnxruntime takes it."""
    if spec.nbytes(*tensor.matrix) >= 4 * math.prod(tensor.matrix):
        return False
    inner = spec.inner if isinstance(spec, SparseSpec) else spec
    if is_depthwise(tensor.shape, tensor.role) and not (isinstance(inner, AffineSpec) and inner.bits == 8):
        return False
    operator = {"linear": "matmul", "embedding": "embedding"}.get(tensor.role, "constant")
    return format != "onnx" or refusal(spec.describe(*tensor.matrix), operator, mode) is None


def _goes_along(tensor: PlannedTensor, method: WeightSettings, spec: Spec, recipe: Recipe) -> bool:
    """Whether what comes before and after it can be: weights that were dropped, gradient steps."""
    return (tensor.prune is None or method.keeps_zeros) and (not recipe.learns or spec.learns)


def _nbytes(tensor: PlannedTensor, static: bool, format: str) -> int:
    graph = graph_bytes(tensor, static) if format == "onnx" else 0
    return tensor.bytes_after + header_bytes((tensor,), {}) + graph


def _with(tensor: PlannedTensor, option: Option) -> PlannedTensor:
    return replace(tensor, method=option.method, spec=option.spec)
