"""What a plan says: of each tensor what will become of it, of the artifact what is in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from compressor.core.passes import PruningSettings, Role, WeightSettings
from compressor.core.spec import Spec


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor: what it is, how it will be stored and by which passes, or why it stays as it is.

    `by` names what chose the encoding, `method` is the pass that makes it, after `prune` if there is one.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    matrix: tuple[int, int]
    bytes_before: int
    spec: Spec
    by: str = ""
    reason: str = ""
    transposed: bool = False
    method: WeightSettings | None = None
    prune: PruningSettings | None = None

    @property
    def bytes_after(self) -> int:
        return self.spec.nbytes(*self.matrix)

    def describe(self) -> dict[str, Any]:
        """The description of its encoding, as exporters take it."""
        return self.spec.describe(*self.matrix)

    def as_json(self) -> dict[str, Any]:
        encoding = {key: value for key, value in self.describe().items() if key not in ("shape", "counts")}
        return {
            "name": self.name, "shape": list(self.shape), "role": self.role, "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after, "encoding": encoding, "by": self.by or None, "reason": self.reason or None,
        }  # fmt: skip


@dataclass(frozen=True)
class InUse:
    """Bytes that a process grows by in which onnxruntime runs the artifact, mapped files included.

    loading   the most while it loads
    loaded    when it is loaded
    running   the most while it reads a piece of text, without what it keeps of it, or one example; None: not known,
              as long as no data tell what an example is
    per_thousand_tokens
              of a decoder's keys and values; 0 where none are kept
    """

    loading: int
    loaded: int
    running: int | None
    per_thousand_tokens: int = 0

    def most(self, tokens: int) -> int:
        """The most of all, with a text of so many tokens."""
        return max(self.loading, (self.running or 0) + tokens * self.per_thousand_tokens // 1000)


@dataclass(frozen=True)
class Plan:
    """The tensors in order, the artifact's files, what it takes to make them, and what to run them where that is
    known."""

    model: str
    architecture: str
    recipe: str
    tensors: tuple[PlannedTensor, ...]
    tied: dict[str, str]
    files: dict[str, int]
    needs: tuple[str, ...]
    peak_memory: int
    cpu_seconds: float
    notes: tuple[str, ...] = field(default=())
    in_use: InUse | None = None

    @property
    def bytes_before(self) -> int:
        return sum(tensor.bytes_before for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Of every file that running the artifact needs."""
        return sum(self.files.values())

    @property
    def pruned(self) -> frozenset[str]:
        """The names of the tensors that lose weights."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.prune is not None)

    @property
    def gradient_norm(self) -> Literal[1, 2] | None:
        """The p of the weights' gradients that the passes which drop weights ask for, if any does."""
        pruned = [tensor.prune for tensor in self.tensors if tensor.prune is not None]
        return next((settings.gradient_norm for settings in pruned if settings.gradient_norm is not None), None)

    def as_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in asdict(self).items() if key != "tensors"}
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return plain | totals | {"tensors": [tensor.as_json() for tensor in self.tensors]}
