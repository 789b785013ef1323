"""Students without some blocks of the teacher, or without some of their parts. They are judged as they are, untrained.

The search runs over one batch of validation data. A student shares all blocks before its first removed one with the
student judged before it, or with the teacher: their outputs are kept and used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.absent import Absent
from compressor.core.batch import call
from compressor.core.device import fast_bfloat16
from compressor.core.students import Layer, Student
from compressor.graph.blocks import first_tensor, patched
from compressor.graph.depth import Unit, hidden_of, with_hidden

_POSITIONS = 256
_SAME = 1e-2
"""Of the change where something has changed: bfloat16 rounds."""


@dataclass
class DepthEvaluator:
    """Judges students; whole and picklable, so that it may do so in a process of its own.

    module    in eval mode
    inputs    one batch of the forward's arguments
    labels    (n,) classes, or None: of a language model that reads from left to right the next tokens, of others the
              teacher's own classes; where its output is a vector per position, students are held to those vectors
    measure   accuracy: a share, or a cosine; perplexity: its inverse, of next tokens
    """

    module: nn.Module
    blocks: list[str]
    units: list[Unit]
    inputs: dict[str, Tensor]
    labels: Tensor | None
    measure: str
    _paths: list[tuple[tuple[frozenset[int], ...], list[Tensor]]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.n_outputs = self._watched_outputs()
        self.wanted: Tensor | None = None
        self.causal = "input_ids" in self.inputs and self._is_causal()
        if self.labels is None and not self.causal:
            outputs = self.logits(Student())
            self.wanted = outputs.float() if outputs.dim() > 2 else None
            self.labels = outputs.argmax(-1) if outputs.dim() == 2 else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_paths": []}

    def evaluate(self, students: Sequence[Student]) -> Iterator[tuple[Student, float]]:
        """Each with its accuracy; in an order in which they share most."""
        for student in sorted(students, key=self._mask):
            yield student, self._score(self.logits(student))

    def influence(self) -> list[float]:
        """1 − mean cosine of each block's input and output over positions, after Men et al., arXiv 2403.03853."""
        states: list[tuple[Tensor, Tensor]] = []
        handles = [
            self.module.get_submodule(name).register_forward_hook(
                lambda _, args, kwargs, output: states.append((hidden_of(args, kwargs), first_tensor(output))),
                with_kwargs=True,
            )
            for name in self.blocks
        ]
        with torch.no_grad():
            self._call()
        for handle in handles:
            handle.remove()
        return [
            1 - float(functional.cosine_similarity(before.double(), after.double(), dim=-1).mean())
            for before, after in states
        ]

    def seconds(self, student: Student) -> float:
        """Of a forward without anything kept; the fastest of three."""
        found = []
        for _ in range(3):
            self._paths.clear()
            began = time.perf_counter()
            self.logits(student)
            found.append(time.perf_counter() - began)
        return min(found)

    def _mask(self, student: Student) -> tuple[bool, ...]:
        return tuple(number in student.removed for number in range(len(self.units)))

    def _call(self) -> Any:
        fast = fast_bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            return call(self.module, self.inputs)

    @torch.no_grad()
    def logits(self, student: Student) -> Tensor:
        """The first output, of all of the batch."""
        gone = [frozenset[int]() for _ in self.blocks]
        for number in student.removed:
            gone[self.units[number].block] |= {number}
        start, kept = self._shared(tuple(gone))
        states = list(kept[: start + 1])
        forwards: dict[nn.Module, Callable] = {}
        for number, unit in enumerate(self.units):
            if unit.kind != "block" and number in student.removed:
                forwards[self.module.get_submodule(unit.name)] = Absent(unit.absent, unit.n_outputs).forward
        for number, name in enumerate(self.blocks):
            block = self.module.get_submodule(name)
            forwards[block] = self._forward(block, number, start, gone[number], states)
        with patched(forwards):
            output = first_tensor(self._call())
        path = (tuple(gone), states)
        self._paths = [self._paths[0], path] if self._paths else [path]
        return output

    def _forward(
        self, block: nn.Module, number: int, start: int, gone: frozenset[int], states: list[Tensor]
    ) -> Callable:
        """What a block does: nothing before the start, from there on what it does, unless it is gone itself."""
        forward = type(block).forward.__get__(block)
        whole = [unit for unit in self.units if unit.block == number and unit.kind == "block"]
        passes = Absent("identity", whole[0].n_outputs).forward if whole else None
        skipped = number < start

        def run(*args: Any, **kwargs: Any) -> Any:
            if skipped:
                return output_like(states[number + 1])
            if number == start and states[start:]:
                args, kwargs = with_hidden(args, kwargs, states[start])
            elif number >= len(states):
                states.append(hidden_of(args, kwargs))
            return passes(*args, **kwargs) if passes and gone else forward(*args, **kwargs)

        def output_like(hidden: Tensor) -> Any:
            n_outputs = self.n_outputs[number]
            return (hidden, *[None] * (n_outputs - 1)) if n_outputs else hidden

        return run

    def _watched_outputs(self) -> list[int]:
        """Of each block: 0 for a tensor alone, or the length of the tuple."""
        seen: list[int] = []
        handles = [
            self.module.get_submodule(name).register_forward_hook(
                lambda _, __, output: seen.append(0 if isinstance(output, Tensor) else len(output))
            )
            for name in self.blocks
        ]
        with torch.no_grad():
            self._call()
        for handle in handles:
            handle.remove()
        return seen

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Whether what is said of a position does not depend on later ones."""
        ids = self.inputs["input_ids"][:1, :16]
        other = ids.clone()
        other[:, -1] = ids[:, 0] if int(ids[0, -1]) != int(ids[0, 0]) else (ids[:, 0] + 1) % 2
        first, second = (first_tensor(self.module(input_ids=each)).float() for each in (ids, other))
        if first.dim() != 3 or first.shape[1] < 2:
            return False
        changed = float((first - second)[:, :-1].abs().max())
        return changed < _SAME * float((first - second)[:, -1:].abs().max())

    def _shared(self, gone: tuple[frozenset[int], ...]) -> tuple[int, list[Tensor]]:
        """How many blocks at the start a path that is kept has in common, and the inputs of its blocks."""
        best: tuple[int, list[Tensor]] = (0, [])
        for other, states in self._paths:
            n = next((i for i, (a, b) in enumerate(zip(gone, other, strict=True)) if a != b), len(gone) - 1)
            best = max(best, (min(n, len(states) - 1), states), key=lambda found: found[0])
        return best

    def _score(self, logits: Tensor) -> float:
        """Accuracy, or the inverse of the perplexity."""
        if self.wanted is not None:
            return max(0.0, float(functional.cosine_similarity(logits.float(), self.wanted, dim=-1).mean()))
        if self.labels is not None:
            return float((logits.argmax(-1) == self.labels).double().mean())
        rows, targets = logits[:, :-1].flatten(0, 1), self.inputs["input_ids"][:, 1:].flatten()
        if self.measure == "accuracy":
            return float((rows.argmax(-1) == targets).double().mean())
        total = 0.0
        for part, target in zip(rows.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
            total += float(functional.cross_entropy(part.float(), target, reduction="sum"))
        return float(torch.tensor(-total / len(targets), dtype=torch.float64).exp())


def unit_layers(units: Sequence[Unit]) -> list[Layer]:
    """Rows of the state: the kind, and for parts their place in the block."""
    n_parts = {block: sum(unit.block == block for unit in units) for block in {unit.block for unit in units}}
    places: dict[int, int] = {}
    found = []
    for unit in units:
        place = places.get(unit.block, 0)
        places[unit.block] = place + 1
        found.append(Layer(unit.name, unit.kind, skip_start=place, skip_end=n_parts[unit.block] - place - 1))
    return found
