"""What every kind of weight file offers: a list of tensors by their stored names, and reading of one."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.core.errors import CheckpointError
from compressor.core.passes import Role
from compressor.core.reading import refuse_special
from compressor.core.resources import refuse_shortage

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Place = Literal["layer", "transposed", "recurrent", "elsewhere"]
"""Whether a layer computes with a tensor, a transposed convolution, a recurrent network, or some module in a way of its
own."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `dtype` in safetensors' spelling ("F32"), or the GGUF type ("Q4_1").

    Where the file itself says what a tensor is for, `role` does, and `transposed` whether a matrix is stored
    (inputs, outputs); elsewhere names and shapes tell. Where the module was built, `place` says what it does with the
    tensor, and `groups` how many a convolution has.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    role: Role | None = None
    transposed: bool = False
    place: Place | None = None
    groups: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Computed:
    """A tensor that `compute` makes of others, by their names in the module, which are `parts`."""

    parts: tuple[str, ...]
    compute: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Source(ABC):
    """The weight files of one checkpoint, under the names that are stored in them.

    `shared` maps a name to the earlier name whose storage it shares. `module` is set where the file itself
    holds a network (a trusted pickle, an exported program). `notes` say what else was found in the files.
    """

    kind: str
    files: list[Path]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    module: Any = None
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own memory; the caller may write to it."""

    def read_row(self, name: str, index: int) -> torch.Tensor:
        """As `read`, the `index`-th of a tensor's first axis alone."""
        return self.read(name)[index].clone()

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values."""
        import torch

        return torch.equal(self.read(first), self.read(second))


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def refuse_empty(path: Path) -> None:
    """Refuse what is no regular file, and files that were never fetched: empty ones, and Git LFS pointers."""
    refuse_special(path)
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as error:
        refuse_shortage(error)
        raise CheckpointError(f"{path}: cannot be read; {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")


def merge_shards(
    parts: Mapping[Path, dict[str, TensorInfo]],
) -> tuple[dict[str, TensorInfo], dict[str, Path]]:
    """All tensors of several files, and where each lies; a name in two files is refused."""
    tensors: dict[str, TensorInfo] = {}
    home: dict[str, Path] = {}
    for path, infos in parts.items():
        for name, info in infos.items():
            if name in home:
                raise CheckpointError(
                    f"{path}: tensor '{name}' is already in {home[name].name}; keep one set of shards"
                )
            tensors[name], home[name] = info, path
    return tensors, home
