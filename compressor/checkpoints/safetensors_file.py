"""The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes.

https://huggingface.co/docs/safetensors. The header is parsed here, so that listing needs no torch. Tensors
are read with plain file reads rather than through a mapping: mapped pages would count as our memory, and the
promise is a few blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.source import Source, TensorInfo, merge_shards, refuse_empty
from compressor.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
LARGEST_HEADER = 100_000_000
CHUNK = 1 << 22


@dataclass
class SafetensorsSource(Source):
    """One or several safetensors files."""

    homes: dict[str, Path] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, files: list[Path]) -> SafetensorsSource:
        headers = {path: read_header(path) for path in files}
        tensors, homes = merge_shards({path: infos for path, (infos, _) in headers.items()})
        starts = {name: start for _, offsets in headers.values() for name, start in offsets.items()}
        return cls("safetensors", files, tensors, homes=homes, starts=starts)

    def file_of(self, name: str) -> Path:
        return self.homes[name]

    def read(self, name: str) -> torch.Tensor:
        return self._read(name, 0, self.tensors[name].shape)

    def read_row(self, name: str, index: int) -> torch.Tensor:
        return self._read(name, index, self.tensors[name].shape[1:])

    def _read(self, name: str, place: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The `place`-th of the tensors of this shape that follow each other in one."""
        import torch

        info = self.tensors[name]
        n_bytes = math.prod(shape) * ITEM_SIZE[info.dtype]
        raw = torch.empty(n_bytes, dtype=torch.uint8)
        with self.homes[name].open("rb") as file:
            file.seek(self.starts[name] + place * n_bytes)
            present = file.readinto(raw.numpy().data) if n_bytes else 0
        if present != n_bytes:
            raise CheckpointError(f"{self.homes[name]}: changed while it was read, at tensor '{name}'")
        return raw.view(getattr(torch, TORCH_NAMES[info.dtype])).reshape(shape)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit for bit; compared without torch, in chunks."""
        one, two = self.tensors[first], self.tensors[second]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        with self.homes[first].open("rb") as left, self.homes[second].open("rb") as right:
            left.seek(self.starts[first])
            right.seek(self.starts[second])
            sizes = (min(CHUNK, one.nbytes - done) for done in range(0, one.nbytes, CHUNK))
            return all(left.read(size) == right.read(size) for size in sizes)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The tensors of a file, and where the bytes of each start."""
    refuse_empty(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LARGEST_HEADER:
            raise CheckpointError(
                f"{path}: is not a safetensors file; its header would be {length} bytes long; "
                "give the file that was saved with safetensors"
            )
        if size < 8 + length:
            raise CheckpointError(
                f"{path}: is truncated; it has {size} bytes, its header alone takes {8 + length}; fetch it again"
            )
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    infos = {name: _info(path, name, entry) for name, entry in header.items()}
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
    promised = max((entry["data_offsets"][1] for entry in header.values()), default=0) + 8 + length
    if size < promised:
        raise CheckpointError(
            f"{path}: is truncated; it has {size} bytes, its header promises {promised}; fetch it again"
        )
    return infos, starts


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is corrupt; {error}; fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is corrupt; not an object; fetch it again")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each of whose names is there once: readers differ in which of two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is in it twice")
    return found


def _count(value: Any) -> int:
    """A number of things as JSON says it: no 4.0, no true, no Infinity, none below nothing."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{str(value)[:40]} is no count")
    return value


def _info(path: Path, name: str, entry: Any) -> TensorInfo:
    try:
        shape = tuple(_count(size) for size in entry["shape"])
        dtype = str(entry["dtype"])
        begin, end = (_count(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header of tensor '{name}' is corrupt; {error!r}; fetch it again") from error
    if dtype not in ITEM_SIZE:
        raise CheckpointError(
            f"{path}: tensor '{name}' is of type {dtype}; known: {', '.join(ITEM_SIZE)}; convert it to one of these"
        )
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: the header of tensor '{name}' is corrupt; {end - begin} bytes for shape {shape} of "
            f"{dtype}, which needs {expected}; fetch it again"
        )
    return TensorInfo(name, shape, dtype, end - begin)
