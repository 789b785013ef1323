"""The workshop of students without some of a transformer's blocks, or of their attentions and MLPs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.batch import Batch, Examples, call
from compressor.core.device import fast_bfloat16
from compressor.core.errors import DataError
from compressor.core.students import Student
from compressor.graph.blocks import block_names, without_cache
from compressor.graph.depth import depth_units, without_units
from compressor.learning.trainer import Fitting
from compressor.passes.settings.n2n import N2nSettings
from compressor.structure.students.depth import DepthEvaluator, unit_layers


class BlockWorkshop:
    """A `students.laboratory.Workshop`.

    Args:
        module: The teacher, float32, in eval mode; it is not changed.
        batches, labels: The validation split is their first `validation` examples or tokens.

    Raises:
        CheckpointError: The network has no repeated blocks.
        DataError: `measure` is of next tokens, and the network predicts none.
    """

    def __init__(
        self, module: nn.Module, batches: Sequence[Batch], labels: Sequence[Tensor] | None, settings: N2nSettings,
        examples: Callable[[], Examples], seed: int, folder: Path | None, advance: Callable[[float, str], None],
    ) -> None:  # fmt: skip
        self.module, self.settings, self.examples, self.seed = module, settings, examples, seed
        self.folder, self.advance = folder, advance
        without_cache(module)
        inputs, chosen = first_examples(batches, labels, settings.validation)
        example = {name: tensor[:1] for name, tensor in inputs.items()}
        self.units = depth_units(module, lambda: call(module, example), settings.units == "part")
        self.layers = unit_layers(self.units)
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        self.sizes = [sum(p.numel() for p in module.get_submodule(unit.name).parameters()) for unit in self.units]
        judged = module
        if "input_ids" in inputs and fast_bfloat16():  # as autocast computes, without a cast of each weight per forward
            judged = copy.deepcopy(module).bfloat16()
        self.evaluator = DepthEvaluator(judged, block_names(module), self.units, inputs, chosen, settings.measure)
        if settings.measure == "perplexity" and (chosen is not None or not self.evaluator.causal):
            raise DataError("n2n: measure perplexity is of decoders, and this network predicts no next tokens; write "
                            "measure: accuracy")  # fmt: skip

    def size(self, student: Student) -> int | None:
        if not student.removed or len(student.removed) == len(self.units) or student.shrunk:
            return None
        return self.parameters - sum(self.sizes[number] for number in student.removed)

    def seconds(self, student: Student) -> float:
        return self.evaluator.seconds(student)

    def influence(self) -> list[float]:
        by_block = self.evaluator.influence()
        return [by_block[unit.block] for unit in self.units]

    def finish(self, student: Student) -> tuple[nn.Module, list[dict[str, float]]]:
        """Without the removed units, and distilled for `epochs`."""
        smaller = without_units(self.module, [self.units[number] for number in student.removed])
        if not self.settings.epochs:
            return smaller, []
        return smaller, Fitting(
            smaller, self.examples(), self.settings, self.seed, self.folder, self.advance, teacher=self.module
        ).train()

    def facts(self) -> dict[str, Any]:
        ids = self.evaluator.inputs.get("input_ids")
        kind = "tokens" if ids is not None else "examples"
        n = ids.numel() if ids is not None else len(next(iter(self.evaluator.inputs.values())))
        measure = "cosine" if self.evaluator.wanted is not None else self.settings.measure
        return {"measure": measure, "validation": f"{n} {kind}"}


def first_examples(
    batches: Sequence[Batch], labels: Sequence[Tensor] | None, n: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """About the first `n` examples of all batches as one; of text, as many windows as have `n` tokens."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    wanted = max(1, n // whole["input_ids"].shape[1]) if "input_ids" in whole else n
    found = None if labels is None else torch.cat(list(labels))[:wanted]
    return {name: tensor[:wanted] for name, tensor in whole.items()}, found
