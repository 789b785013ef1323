"""Judges the students of one teacher: each once, side by side, with a journal that a resumed search goes on from.

A search asks the same questions in the same order whenever it starts, so what is needed to resume it is the answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from compressor.core.students import Layer, Student
from compressor.structure.students.pool import Pool

JOURNAL = "search.jsonl"


class Workshop(Protocol):
    """What a kind of students is made of, and how.

    layers, parameters   of the teacher
    """

    parameters: int

    @property
    def layers(self) -> Sequence[Layer]: ...

    def size(self, student: Student) -> int | None:
        """Its parameters; None where it cannot be."""
        ...

    def seconds(self, student: Student) -> float:
        """Of a forward of a validation batch."""
        ...

    def influence(self) -> list[float]:
        """Of each layer."""
        ...

    def finish(self, student: Student) -> tuple[nn.Module, list[dict[str, float]]]:
        """It, after its final training, and what that came to."""
        ...

    def facts(self) -> dict[str, Any]:
        """How students are judged."""
        ...


class Laboratory:
    """A workshop whose students are judged by a pool; a `core.students.Students`.

    Args:
        start: Makes the pool, when the first student is due.
        folder: Of the journal; None keeps none.
        watch: Hears of every student that is judged.
    """

    def __init__(
        self, workshop: Workshop, start: Callable[[], Pool], folder: Path | None, watch: Callable[[str], None]
    ) -> None:
        self.workshop, self.layers, self.parameters = workshop, workshop.layers, workshop.parameters
        self.start, self.folder, self.watch = start, folder, watch
        self.pool: Pool | None = None
        self.answers = dict(self._read())
        self.asked: set[Student] = set()
        (self.accuracy,) = self.judge([Student()])

    @property
    def n_judged(self) -> int:
        """Students beside the teacher that this search has asked for, whether or not the journal knew them."""
        return len(self.asked - {Student()})

    def size(self, student: Student) -> int | None:
        return self.workshop.size(student)

    def judge(self, students: Sequence[Student]) -> list[float]:
        due = [s for s in dict.fromkeys(students) if self._name("accuracy", s) not in self.answers]
        if due:
            self.pool = self.pool or self.start()
            began = time.perf_counter()
            for student, accuracy in self.pool.evaluate(due):
                now = time.perf_counter()
                self._note(self._name("accuracy", student), accuracy, seconds=round(now - began, 3))
                began = now
                self.watch(f"{accuracy:.4f}")
        self.asked |= set(students)
        return [self.answers[self._name("accuracy", student)] for student in students]

    def slowness(self, student: Student) -> float:
        teacher = self._asked("seconds", Student(), self.workshop.seconds)
        return self._asked("seconds", student, self.workshop.seconds) / teacher

    def influence(self) -> list[float]:
        if "influence" not in self.answers:
            self._note("influence", self.workshop.influence())
        return self.answers["influence"]

    def finish(self, student: Student) -> tuple[nn.Module, list[dict[str, float]]]:
        self.close()
        return self.workshop.finish(student)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def facts(self) -> dict[str, Any]:
        return self.workshop.facts()

    def _asked(self, what: str, student: Student, ask: Callable[[Student], float]) -> float:
        name = self._name(what, student)
        if name not in self.answers:
            self._note(name, ask(student))
        return self.answers[name]

    @staticmethod
    def _name(what: str, student: Student) -> str:
        return f"{what} {student.key}"

    def _read(self) -> Iterator[tuple[str, Any]]:
        """What the journal holds; its last line may be half."""
        if self.folder is None or not (self.folder / JOURNAL).is_file():
            return
        text = (self.folder / JOURNAL).read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            yield entry["asked"], entry["answer"]

    def _note(self, name: str, answer: Any, **more: Any) -> None:
        self.answers[name] = answer
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"asked": name, "answer": answer} | more) + "\n")
