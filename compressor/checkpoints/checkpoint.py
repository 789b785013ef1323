"""A checkpoint: the tensors of its files by the names of its module, and the module that they belong to.

Nothing here imports torch; methods that need it do so when they are called.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.architecture import Architecture
from compressor.checkpoints.card import card_of
from compressor.checkpoints.expected import COMPUTED, expected_tensors
from compressor.checkpoints.positions import positions_of
from compressor.checkpoints.scales import belongs_to_scales, scaled, unread
from compressor.checkpoints.source import Computed, Source, TensorInfo, digest_of
from compressor.checkpoints.ties import declared_ties, prefixed
from compressor.checkpoints.tokenizer import copy_tokenizer
from compressor.core.errors import CheckpointError
from compressor.core.snapshot import Snapshot

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compressor.checkpoints.reshaping import Reshaping

__all__ = ["Checkpoint", "TensorInfo"]

PACKED = (".qweight", ".weight_packed", ".SCB", ".absmax", ".g_idx")


class Checkpoint:
    """Weights on disk, a config, a tokenizer, an architecture.

    `tensors` are named as in the state dict of the module that `build` returns; a table with several names is
    listed once, and `tied` maps its other names to it. The first `build` or `check` corrects names that only
    the module knows, and drops what it does not use, which is then in `skipped`.
    """

    def __init__(
        self,
        path: Path,
        source: Source,
        architecture: Architecture,
        *,
        config: dict[str, Any] | None = None,
        tokenizer_files: Iterable[Path] = (),
        seen: Snapshot | None = None,
    ):
        self.path = path
        self.kind = "huggingface" if config is not None and source.kind != "gguf" else source.kind
        self.architecture = architecture.name
        self.family = architecture.family
        self.config = copy.deepcopy(config)
        self._beside = list(tokenizer_files)
        self.seen = seen or Snapshot({})  # its files as they were before any was read
        self.skipped: list[str] = []
        self.notes: list[str] = list(source.notes)  # what a plan says of the files
        self.source = source
        self.positions = positions_of(config)  # of tokens in a row; None where nothing says how many
        self.reshaping: Reshaping | None = None  # of a network that became smaller in a way no config can say
        self.blueprint = architecture
        self.aligned = False
        self.name_tensors(prefixed(source.tensors, config), declared_ties)
        _refuse_packed(self)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.kind}, {self.architecture}, {len(self.tensors)} tensors)"

    def name_tensors(
        self, rename: dict[str, str], ties: Any, computed: dict[str, tuple[Computed, dict[str, str]]] | None = None
    ) -> None:
        """Set `tensors` and `tied` from stored name -> module name and the declared ties of these names.

        `computed` are further tensors: of each how it is computed, and the stored names of what from. A declared tie
        whose two tables are both stored and differ is no tie; transformers does the same.
        """
        rename = {name: target for name, target in rename.items() if not belongs_to_scales(name, self.source.tensors)}
        computed = scaled(self.source.tensors, rename) | (computed or {})
        stored = {canonical: name for name, canonical in rename.items()}
        declared: dict[str, str] = ties(stored, self.config)
        tied = _shared_names(self.source.shared, rename)
        for alias, canonical in declared.items():
            if alias in stored and canonical in stored and not self._is_same(stored, alias, canonical, tied):
                self._untie(alias)
                continue
            if alias in stored and canonical not in stored:
                stored[canonical] = stored[alias]
            if canonical in stored:
                tied = _join(tied, alias, canonical)
        self._stored = {name: stored[name] for name in stored if name not in tied and name not in computed}
        self.tied = dict(sorted(tied.items()))
        self._computed = computed
        self.tensors = {name: self._info(name) for name in self._stored}
        self.tensors |= {name: self._computed_info(name) for name in self._computed if name not in tied}

    def _is_same(self, stored: dict[str, str], alias: str, canonical: str, tied: dict[str, str]) -> bool:
        if tied.get(alias, alias) == tied.get(canonical, canonical):
            return True
        return self.source.same(stored[alias], stored[canonical])

    def _untie(self, alias: str) -> None:
        if self.config is not None and alias.endswith(".weight"):
            self.config["tie_word_embeddings"] = False

    def _info(self, name: str) -> TensorInfo:
        info = self.source.tensors[self._stored[name]]
        return replace(info, name=name)

    def _computed_info(self, name: str) -> TensorInfo:
        """What a tensor will be that is computed: of the size of the largest that it is computed from."""
        parts = [self.source.tensors[part] for part in self._computed[name][1].values()]
        largest = max(parts, key=lambda info: info.numel)
        return replace(largest, name=name, dtype="F32" if largest.dtype == "I8" else largest.dtype)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, or the first of what it is computed from."""
        canonical = self.tied.get(name, name)
        computed = self._computed.get(canonical)
        return self.source.file_of(next(iter(computed[1].values())) if computed else self._stored[canonical])

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name or an alias, in its stored dtype (float32 for GGUF), in memory of its own.

        Raises:
            CheckpointError: There is no such tensor, or it holds NaN or infinite values.
        """
        canonical = self.tied.get(name, name)
        if canonical not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor '{name}'; it has {len(self.tensors)} others")
        tensor = self._read(canonical)
        bad = _count_not_finite(tensor) if tensor.is_floating_point() else 0
        if bad:
            raise CheckpointError(
                f"{self.file_of(canonical)}: tensor '{canonical}' holds {bad} NaN or infinite values of "
                f"{tensor.numel()}; give a checkpoint from before the training diverged"
            )
        return tensor

    def _read(self, canonical: str) -> torch.Tensor:
        if canonical not in self._computed:
            return self.source.read(self._stored[canonical])
        how, parts = self._computed[canonical]
        return how.compute({name: self.source.read(stored).float() for name, stored in parts.items()})

    def build(self, device: str = "meta") -> nn.Module:
        """The module in eval mode. On "meta" its parameters have no memory; its buffers are real.

        On another device the weights are loaded as well.
        """
        from compressor.checkpoints import skeleton

        module = skeleton.construct(self.blueprint, self.config)
        skeleton.align(self, module)
        if device != "meta":
            self.check()
            skeleton.load(self, module, None, device)
            module.to(device)
        return module

    def materialise(
        self, module: nn.Module, names: Iterable[str] | None = None, device: str | torch.device = "cpu"
    ) -> None:
        """Load the named parameters and persistent buffers (all, by default) of a module from `build`.

        A tied parameter stays one object under all its names.
        """
        from compressor.checkpoints import skeleton

        skeleton.load(self, module, names, device)

    def materialise_buffers(self, module: nn.Module) -> None:
        """Make buffers real that have no memory, by taking them from a freshly built module."""
        from compressor.checkpoints import skeleton

        skeleton.load_buffers(self, module)

    def check(self) -> None:
        """Compare names and shapes with the module's; what the module does not use goes to `skipped`.

        The module is built for it, but for common kinds of networks whose tensors a config tells by itself.

        Raises:
            CheckpointError: A tensor is missing, or has the wrong shape.
        """
        if self.kind == "onnx" or (self.reshaping is None and self._is_as_expected()):
            return  # a graph is its own module
        from compressor.checkpoints import skeleton

        skeleton.check(self, skeleton.construct(self.blueprint, self.config))

    def _is_as_expected(self) -> bool:
        """Whether names and shapes are those that the config is known to lead to; computed buffers are dropped then."""
        expected = expected_tensors(self.config)
        if expected is None:
            return False
        needed = {name: info for name, info in self.tensors.items() if name in expected or not COMPUTED.search(name)}
        if any(info.dtype[0] in "IU" for info in needed.values()):
            return False
        if {name: info.shape for name, info in needed.items()} != expected:
            return False
        self._stored = {name: self._stored[name] for name in needed if name in self._stored}
        self.tensors = needed
        return True

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files: what lies beside the weights, else what a GGUF file says, written by the first call.

        Raises:
            CheckpointError: What a GGUF file says is no tokenizer.
        """
        if self.kind == "gguf" and not self._beside:
            from compressor.checkpoints.gguf_file import gguf_tokenizer

            self._beside = gguf_tokenizer(self.source.files[0])
        return self._beside

    def write_tokenizer(self, directory: Path) -> list[Path]:
        """Write the tokenizer's files into a directory, tokenizer.json without spaces; returns the paths."""
        return copy_tokenizer(self.tokenizer_files, Path(directory))

    def digest(self) -> str:
        """SHA-256 of the weight files' bytes, in the order of their names."""
        return digest_of(self.source.files)

    def describe(self) -> dict[str, Any]:
        """A summary for people and JSON."""
        dtypes: dict[str, int] = {}
        for info in self.tensors.values():
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
        return {
            "path": str(self.path),
            "kind": self.kind,
            "architecture": self.architecture,
            "family": self.family,
            "files": [path.name for path in self.source.files],
            "file_bytes": sum(path.stat().st_size for path in self.source.files),
            "n_tensors": len(self.tensors),
            "n_parameters": sum(info.numel for info in self.tensors.values()),
            "tensor_bytes": sum(info.nbytes for info in self.tensors.values()),
            "bytes_by_dtype": dict(sorted(dtypes.items())),
            "tied": dict(self.tied),
            "tokenizer_files": [path.name for path in self._beside],
            "card": card_of(self.path, self.config),
        }


def _count_not_finite(tensor: torch.Tensor, chunk: int = 1 << 20) -> int:
    """How many values are NaN or infinite; in chunks, since the masks of a whole table would double it."""
    exact = tensor.element_size() > 1  # float8 has no isfinite of its own
    parts = tensor.reshape(-1).split(chunk)
    return sum(int((~(part if exact else part.float()).isfinite()).sum()) for part in parts)


def _shared_names(shared: dict[str, str], rename: dict[str, str]) -> dict[str, str]:
    """Alias -> canonical by module names; canonical is the first name of a storage that the module has."""
    tied: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, target in rename.items():
        canonical = first.setdefault(shared.get(name, name), target)
        if canonical != target:
            tied[target] = canonical
    return tied


def _join(tied: dict[str, str], alias: str, canonical: str) -> dict[str, str]:
    """The ties with one more; everything that was tied to either of the two is now tied to `canonical`."""
    roots = {tied.get(name, name) for name in (alias, canonical)}
    members = {alias, canonical} | roots | {name for name, root in tied.items() if root in roots}
    rest = {name: root for name, root in tied.items() if name not in members}
    return rest | dict.fromkeys(sorted(members - {canonical}), canonical)


def _refuse_packed(checkpoint: Checkpoint) -> None:
    tensors = checkpoint.source.tensors
    packed = [name for name in checkpoint.tensors if name.endswith(PACKED)]
    packed += unread(tensors, [stored for _, parts in checkpoint._computed.values() for stored in parts.values()])
    if packed:
        raise CheckpointError(
            f"{checkpoint.path}: is already quantised; found '{packed[0]}' and {len(packed) - 1} more "
            "packed tensors; give the original checkpoint in float32, float16 or bfloat16"
        )
