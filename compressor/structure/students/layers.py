"""The workshop of a convolutional network's students: fewer layers, and less of each; judged after a short training."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.batch import Examples
from compressor.core.errors import DataError
from compressor.core.students import Student
from compressor.graph.chain import Chain, read_chain
from compressor.graph.rebuild import InvalidStudent, build_student
from compressor.learning.trainer import Fitting, called
from compressor.passes.settings.n2n import N2nSettings

_AT_ONCE = 256
_FUSED = ("Adam", "AdamW", "SGD", "Adagrad")
"""Optimizers of torch that can step in one pass over the weights: of small networks that is a tenth of the time."""


@dataclass
class LayerEvaluator:
    """Trains students for a little while and judges them; picklable.

    training     what they learn from, with the teacher's outputs
    validation   what they are judged on; labels are classes, the teacher's where the data has none
    """

    teacher: nn.Module
    chain: Chain
    training: Examples
    validation: Examples
    settings: N2nSettings
    seed: int

    def evaluate(self, students: Sequence[Student]) -> Iterator[tuple[Student, float]]:
        """Each with its accuracy; the teacher is not trained."""
        for student in students:
            if student == Student():
                yield student, self.accuracy(self.teacher)
                continue
            module = quick(self.build(student))
            Fitting(module, self.training, self.lessons(), self._seed(student), None, lambda share, note: None).train()
            yield student, self.accuracy(module)

    def lessons(self) -> N2nSettings:
        """The short training: on the teacher's outputs."""
        settings = self.settings
        rate = settings.student_rate or settings.rate
        options = ({"fused": True} if settings.optimizer in _FUSED else {}) | settings.options
        return settings.model_copy(
            update={"epochs": settings.student_epochs, "loss": "teacher", "rate": rate, "options": options}
        )

    def build(self, student: Student) -> nn.Module:
        """Before its training.

        Raises:
            InvalidStudent: It cannot be.
        """
        generator = torch.Generator().manual_seed(self._seed(student))
        example = {name: values[:2] for name, values in self.validation.inputs.items()}
        fresh = self.settings.init == "fresh"
        return build_student(self.teacher, self.chain, student, example, fresh, generator)

    @torch.no_grad()
    def accuracy(self, module: nn.Module) -> float:
        """The share of validation examples whose class is right."""
        right = 0
        assert self.validation.labels is not None
        for index in torch.arange(len(self.validation)).split(_AT_ONCE):
            batch, labels = self.validation.take(index)
            right += int((called(module, batch).argmax(-1) == labels).sum())
        return right / len(self.validation)

    @torch.no_grad()
    def seconds(self, student: Student) -> float:
        """Of a forward of 32 examples; the fastest of five."""
        module = self.teacher if student == Student() else self.build(student)
        batch, _ = self.validation.take(torch.arange(min(32, len(self.validation))))
        found = []
        for _ in range(5):
            began = time.perf_counter()
            called(module, batch)
            found.append(time.perf_counter() - began)
        return min(found)

    def _seed(self, student: Student) -> int:
        return zlib.crc32(f"{self.seed} {student.key}".encode())


class LayerWorkshop:
    """A `students.laboratory.Workshop`.

    Args:
        module: The teacher, float32, in eval mode; it is not changed.
        examples: All of the data; `validation` of them are set aside.

    Raises:
        CheckpointError: The forward cannot be traced.
        DataError: There are too few examples to set some aside.
    """

    def __init__(
        self, module: nn.Module, examples: Examples, settings: N2nSettings, seed: int, folder: Path | None,
        advance: Callable[[float, str], None],
    ) -> None:  # fmt: skip
        self.settings, self.seed, self.folder, self.advance = settings, seed, folder, advance
        if len(examples) < 4:
            raise DataError(f"n2n: {len(examples)} examples cannot be split into some to train and some to judge on")
        teacher = copy.deepcopy(module).eval().requires_grad_(False)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        n = min(settings.validation, len(examples) // 3)
        self.examples = taught(teacher, examples, order[n:])
        validation = taught(teacher, examples, order[:n])
        if validation.labels is None:
            assert validation.wanted is not None
            validation = Examples(validation.inputs, validation.wanted.argmax(-1))
        chain = read_chain(teacher, {name: values[:2] for name, values in validation.inputs.items()})
        short = self.examples.part(torch.arange(min(settings.student_examples, len(self.examples))))
        self.evaluator = LayerEvaluator(teacher, chain, short, validation, settings, seed)
        self.layers = chain.layers
        self.parameters = sum(parameter.numel() for parameter in teacher.parameters())
        self.sizes: dict[Student, int | None] = {}

    def size(self, student: Student) -> int | None:
        if student not in self.sizes:
            try:
                found = sum(parameter.numel() for parameter in self.evaluator.build(student).parameters())
            except InvalidStudent:
                found = self.parameters
            self.sizes[student] = found if found < self.parameters else None
        return self.sizes[student]

    def seconds(self, student: Student) -> float:
        return self.evaluator.seconds(student)

    def influence(self) -> list[float]:
        raise NotImplementedError("influence is of blocks")

    def finish(self, student: Student) -> tuple[nn.Module, list[dict[str, float]]]:
        """Trained for `epochs`, at least as long as it was for being judged: on labels and on the teacher."""
        settings = self.settings
        loss = settings.loss or ("teacher" if self.examples.labels is None else "both")
        epochs = max(settings.epochs, settings.student_epochs)
        settings = settings.model_copy(update={"epochs": epochs, "loss": loss})
        module = self.evaluator.build(student)
        return module, Fitting(module, self.examples, settings, self.seed, self.folder, self.advance).train()

    def facts(self) -> dict[str, Any]:
        n = len(self.evaluator.validation)
        return {"measure": "accuracy", "validation": f"{n} examples", "student_examples": len(self.evaluator.training)}


def quick(module: nn.Module) -> nn.Module:
    """The network with the layout of weights in which CPUs convolve images fastest, forwards and backwards."""
    images = any(isinstance(child, nn.Conv2d) for child in module.modules())
    if images:
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module


@torch.no_grad()
def taught(teacher: nn.Module, examples: Examples, index: Tensor) -> Examples:
    """Some examples, with the teacher's outputs."""
    chosen = examples.part(index)
    outputs = [called(teacher, chosen.take(part)[0]) for part in torch.arange(len(chosen)).split(_AT_ONCE)]
    return Examples(chosen.inputs, chosen.labels, torch.cat(outputs))
