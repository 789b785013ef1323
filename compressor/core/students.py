"""Students of a network, as a search describes them: which layers are gone, and what has shrunk in the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

KINDS = ("conv", "linear", "pool", "block", "attention", "mlp", "part")
ATTRIBUTES = ("outputs", "kernel", "padding")
MULTIPLIERS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Layer:
    """One layer of a teacher, or one block of a transformer: a row of the state that a policy reads.

    skip_start   its index inside its residual block; 0 outside
    skip_end     the block's length − index − 1; 0 outside
    fixed        why it cannot be removed; empty where it can
    shrinks      which of ATTRIBUTES can become smaller
    """

    name: str
    kind: str
    kernel: int = 0
    stride: int = 0
    outputs: int = 0
    padding: int = 0
    skip_start: int = 0
    skip_end: int = 0
    fixed: str = ""
    shrinks: tuple[str, ...] = ()

    def row(self) -> tuple[float, ...]:
        """(type, kernel, stride, outputs, padding, skip_start, skip_end) as the paper has them."""
        sizes = (self.kernel, self.stride, self.outputs, self.padding, self.skip_start, self.skip_end)
        return (float(KINDS.index(self.kind)), *map(float, sizes))


@dataclass(frozen=True, order=True)
class Student:
    """A canonical description: layers that are gone, ascending, and (layer, attribute, multiplier) below 1."""

    removed: tuple[int, ...] = ()
    shrunk: tuple[tuple[int, str, float], ...] = ()

    @classmethod
    def of(cls, removed: Sequence[int], shrunk: Sequence[tuple[int, str, float]] = ()) -> Student:
        """In canonical form."""
        gone = set(removed)
        left = sorted((layer, name, share) for layer, name, share in shrunk if share != 1.0 and layer not in gone)
        return cls(tuple(sorted(gone)), tuple(left))

    @property
    def key(self) -> str:
        """As text, for a cache and for files."""
        return json.dumps([list(self.removed), [list(each) for each in self.shrunk]], separators=(",", ":"))

    @classmethod
    def read(cls, key: str) -> Student:
        removed, shrunk = json.loads(key)
        return cls(tuple(removed), tuple((layer, name, share) for layer, name, share in shrunk))


class Students(Protocol):
    """Builds students of one teacher and finds out how good they are.

    layers       of the teacher, in the order in which a forward reaches them
    parameters   of the teacher
    accuracy     of the teacher on the validation split: a share, or 1/perplexity
    n_judged     students that this search has asked for so far; a resumed one asks again for those before
    """

    layers: Sequence[Layer]
    parameters: int
    accuracy: float

    @property
    def n_judged(self) -> int: ...

    def size(self, student: Student) -> int | None:
        """Its parameters; None where it cannot be: shapes that do not fit, an empty field, not smaller."""
        ...

    def judge(self, students: Sequence[Student]) -> list[float]:
        """The accuracy of each after a short training, by the teacher's measure; each student is evaluated once."""
        ...

    def influence(self) -> list[float]:
        """1 − cos(input, output) of each block."""
        ...

    def finish(self, student: Student) -> tuple[nn.Module, list[dict[str, float]]]:
        """The student after its final training, and what its epochs came to."""
        ...

    def close(self) -> None:
        """Lets go of the processes that judge."""
        ...

    def slowness(self, student: Student) -> float:
        """Its latency over the teacher's."""
        ...

    def facts(self) -> dict[str, Any]:
        """For the report: how students were judged."""
        ...
