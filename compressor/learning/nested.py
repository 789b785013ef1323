"""The training of a network together with those in it: each step through some of them, on the mean of their gradients.

Sizes that learn on micro-batches of one step: Valipour et al., SortedNet, arXiv 2309.00255; the sandwich rule and
learning from the largest one: Yu and Huang, "Universally slimmable networks", arXiv 1903.05134.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.core.batch import Examples
from compressor.core.errors import RecipeError
from compressor.core.nested import Nested
from compressor.core.training import Training
from compressor.learning.trainer import Fitting, called
from compressor.runtime.torchrun import n_processes

_ASIDE = 15485863
"""Sets the draws of sizes apart from the order of the examples."""
_MOST_KEPT = 1 << 28
"""Bytes of the teacher's outputs that are kept at most; of more it runs again each time."""


def fitting(
    module: nn.Module, examples: Examples, settings: Training, seed: int, folder: Path | None,
    advance: Callable[[float, str], None], teacher: nn.Module | None = None,
) -> Fitting:  # fmt: skip
    """What trains a module as settings say, one with others in it or any; arguments as of `Fitting`."""
    kind = NestedFitting if isinstance(module, Nested) else Fitting
    return kind(module, examples, settings, seed, folder, advance, teacher)


class NestedFitting(Fitting):
    """Trains what is `Nested`, in place; as `Fitting` in all else.

    Raises:
        RecipeError: There are several processes, or fewer examples in a step than networks that share them.
    """

    def __init__(
        self, module: nn.Module, examples: Examples, settings: Training, seed: int, folder: Path | None,
        advance: Callable[[float, str], None], teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        if n_processes() > 1:
            raise RecipeError(f"{settings.name}: trains in one process, and torchrun started {n_processes()}")
        assert isinstance(module, Nested)
        super().__init__(module, examples, settings, seed, folder, advance, teacher)
        self.nested = module
        self.first: Tensor | None = None
        if self.teacher is not None:
            self._know(self.teacher)

    @torch.no_grad()
    def _know(self, teacher: nn.Module) -> None:
        """Runs the teacher once for all examples, where its outputs are small."""
        parts = [torch.arange(len(self.examples))[at : at + 256] for at in range(0, len(self.examples), 256)]
        first = called(teacher, self.examples.part(parts[0][:1]).inputs)
        if first.numel() * first.element_size() * len(self.examples) > _MOST_KEPT:
            return
        wanted = torch.cat([called(teacher, self.examples.part(part).inputs) for part in parts])
        self.examples, self.teacher = replace(self.examples, wanted=wanted), None

    def _gradients(self, parallel: nn.Module, examples: Examples, step: int) -> float:
        drawn = self.nested.drawn(torch.Generator().manual_seed(self.seed * _ASIDE + step))
        places = torch.arange(len(examples))
        if self.nested.splits and len(places) < len(drawn):
            raise RecipeError(
                f"{self.settings.name}: {len(places)} examples of a step are fewer than {len(drawn)} draws; write a "
                "larger batch"
            )
        parts = places.tensor_split(len(drawn)) if self.nested.splits else [places] * len(drawn)
        total, self.first = 0.0, None
        for network, part in zip(drawn, parts, strict=True):
            given = examples.part(part)
            outputs = called(network, given.inputs)
            loss = self._loss(outputs, given)
            loss.backward()
            total += float(loss.detach())
            if self.nested.teaches and self.first is None:
                self.first = outputs.detach()
        self.nested.gather(drawn)
        return total / len(drawn)

    def _wanted(self, examples: Examples) -> Tensor | None:
        return super()._wanted(examples) if self.first is None else self.first
