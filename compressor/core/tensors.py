"""The tensors of a compressed network, by name: read lazily from a safetensors file that holds their packed parts.

A part of tensor `t` is stored as `t.<part>` (a dense tensor simply as `t`). How the parts rebuild the tensors stands in
the file's metadata under the key `compressor`, so that one file is complete in itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compressor.core.device import HOST
from compressor.core.encoding import Dense, Encoding, Layout, describe, parts_under, restore
from compressor.core.errors import CheckpointError
from compressor.core.files import whole
from compressor.core.packed import METADATA_KEY, StoredPart, packed_header, part_name

_DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor of the network: an `encoding` of its matrix, and the `layout` that makes it the tensor again."""

    encoding: Encoding
    layout: Layout

    def decode(self) -> Tensor:
        """The tensor, float32, as the network computes with it."""
        return self.layout.tensor(self.encoding.decode())

    def beginning(self, shape: tuple[int, ...]) -> EncodedTensor:
        """The first entries along every dimension: a tensor of this `shape`, of the same codes.

        Raises:
            CheckpointError: They are no encoding of their own.
        """
        reason = "" if begins(shape, self.layout.shape) else f"no beginning of {self.layout.shape} has shape {shape}"
        layout = Layout(shape, self.layout.transposed)
        rows, columns = matrix_of_shape(shape, self.layout.transposed)
        reason = reason or self.encoding.indivisible(rows, columns)
        if reason:
            raise CheckpointError(
                f"a smaller network cannot share its tensor: {reason}; write another multiple or group"
            )
        return EncodedTensor(self.encoding.beginning(rows, columns), layout)

    @classmethod
    def dense(cls, tensor: Tensor, dtype: torch.dtype = torch.float32) -> EncodedTensor:
        """Stores `tensor` as it is, in `dtype`."""
        layout = Layout(tuple(tensor.shape))
        shape = matrix_of_shape(tensor.shape, False)
        return cls(Dense(shape, tensor.detach().reshape(shape).to(dtype)), layout)


def begins(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a tensor of `shape` can be the beginning of one of shape `whole`: fewer outputs and inputs, no less of
    what lies behind them."""
    same = len(shape) == len(whole) and tuple(shape[2:]) == tuple(whole[2:])
    return same and all(n <= size for n, size in zip(shape, whole, strict=True))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name; of those under several names the first."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def matrix_of_shape(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """The (rows, columns) of the matrix of a tensor."""
    first, rest = shape[0] if len(shape) else 1, math.prod(shape[1:])
    return (rest, first) if transposed else (first, rest)


@dataclass(frozen=True)
class Part:
    """Where a tensor of a smaller network is: the beginning, of this `shape`, of the tensor `stored`."""

    stored: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where the bytes of a part lie: in a `file` of that name, `nbytes` from `offset` on."""

    file: str
    offset: int
    nbytes: int


def _description(tensor: EncodedTensor) -> dict:
    layout = tensor.layout
    return {**describe(tensor.encoding), "tensor_shape": list(layout.shape), "transposed": layout.transposed}


class EncodedTensors(Mapping[str, EncodedTensor]):
    """A read-only mapping, name to tensor, over one or more safetensors files written by `write_tensors`.

    Args:
        paths: The files. Of two that have a tensor, the later one counts; it is read when it is asked for.
        tied: Names that stand for another tensor's, beside those that the files name.
        own: Whether tensors count that only smaller networks in it have.
        device: Where what is read is put.

    Raises:
        CheckpointError: A file is damaged, or not written so.
    """

    def __init__(
        self, paths: Iterable[Path | str], tied: Mapping[str, str] | None = None, own: bool = False,
        device: str | torch.device = HOST,
    ) -> None:  # fmt: skip
        self._files, self._descriptions, self._device = {}, {}, device
        self._places: dict[str, Place] = {}
        self.tied: dict[str, str] = dict(tied or {})
        for path in paths:
            handle = _open(Path(path))
            text = (handle.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise CheckpointError(f"{path}: not written by compressor (no '{METADATA_KEY}' metadata)")
            try:
                metadata = json.loads(text)
                hidden = frozenset(() if own else metadata.get("own", ()))
                found = {name: each for name, each in metadata["tensors"].items() if name not in hidden}
                self._descriptions |= found
                self._files |= dict.fromkeys(found, handle)
                self.tied |= metadata["tied"]
                self._places |= _places(Path(path))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{path}: its metadata are damaged; {error!r}; compress again") from error

    def __getitem__(self, name: str) -> EncodedTensor:
        name = self.tied.get(name, name)
        if name not in self._descriptions and self._half(name) is not None:
            whole, _, half = name.rpartition(".")
            encoding = getattr(self[whole].encoding, half)
            return EncodedTensor(encoding, Layout(encoding.shape))
        description, handle = self._descriptions[name], self._files[name]
        parts = {part: handle.get_tensor(part_name(name, part)).to(self._device) for part in description["parts"]}
        layout = Layout(tuple(description["tensor_shape"]), description["transposed"])
        return EncodedTensor(restore(description, parts), layout)

    def __contains__(self, name: object) -> bool:
        """Without reading it."""
        if not isinstance(name, str):
            return False
        name = self.tied.get(name, name)
        return name in self._descriptions or self._half(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._descriptions)

    def __len__(self) -> int:
        return len(self._descriptions)

    def describe(self, name: str) -> dict:
        """Kind, shape, settings and parts of the tensor `name`, without reading it.

        `name.inner` and `name.extra` are the halves of one whose kind is refined.
        """
        name = self.tied.get(name, name)
        return self._descriptions.get(name) or self._half(name) or self._descriptions[name]

    def place(self, tensor: str, part: str) -> Place:
        """Where a `part` of a `tensor` lies in its file; for external data of ONNX."""
        return self._places[part_name(self.tied.get(tensor, tensor), part)]

    def nbytes(self, name: str) -> int:
        """The bytes of all parts of the tensor `name` in its file."""
        name = self.tied.get(name, name)
        return sum(self.place(name, part).nbytes for part in self._descriptions[name]["parts"])

    def _half(self, name: str) -> dict | None:
        whole, _, half = name.rpartition(".")
        description = self._descriptions.get(whole)
        if half not in ("inner", "extra") or description is None or description["kind"] != "refined":
            return None
        found, parts = description[half], parts_under(half, dict.fromkeys(description["parts"]))
        return {**found, "tensor_shape": found["shape"], "transposed": False, "parts": sorted(parts)}


class SizeTensors(EncodedTensors):
    """The tensors of a smaller network, by its names, in the file of the network that it is in.

    Args:
        path: The file.
        parts: Where each of its tensors is.
        tied: Of its names, those that stand for another one's.

    Raises:
        CheckpointError: The file is damaged, or a part is not in it.
    """

    def __init__(self, path: Path, parts: Mapping[str, Part], tied: Mapping[str, str]) -> None:
        super().__init__([path], own=True)
        self._stored, places, files = self._descriptions, self._places, self._files
        self._parts, self.tied = dict(parts), dict(tied)
        self._descriptions, self._places, self._files = {}, {}, {}
        for name, part in parts.items():
            description = self._stored.get(part.stored)
            if description is None or not begins(part.shape, description["tensor_shape"]):
                raise CheckpointError(f"{path}: holds no '{part.stored}' that begins with {part.shape}; compress again")
            self._descriptions[name] = _begun(description, part.shape)
            self._files[name] = files[part.stored]
            for each in description["parts"]:
                self._places[part_name(name, each)] = places[part_name(part.stored, each)]

    def __getitem__(self, name: str) -> EncodedTensor:
        name = self.tied.get(name, name)
        if name not in self._parts:
            return super().__getitem__(name)
        part = self._parts[name]
        description, handle = self._stored[part.stored], self._files[name]
        parts = {each: handle.get_tensor(part_name(part.stored, each)) for each in description["parts"]}
        layout = Layout(tuple(description["tensor_shape"]), description["transposed"])
        whole = EncodedTensor(restore(description, parts), layout)
        return whole if part.shape == layout.shape else whole.beginning(part.shape)

    def nbytes(self, name: str) -> int:
        """The bytes that the tensor `name` has alone."""
        return self[name].encoding.nbytes


def _begun(description: dict, shape: tuple[int, ...]) -> dict:
    """What is said of a tensor's beginning; "stored": the rows and columns of the matrix that there are in the file."""
    if list(shape) == list(description["tensor_shape"]):
        return description
    rows, columns = matrix_of_shape(shape, description["transposed"])
    found = description | {"shape": [rows, columns], "tensor_shape": list(shape), "stored": description["shape"]}
    if description.get("group", 0) >= description["shape"][1]:
        found["group"] = columns
    return found


def _places(path: Path) -> dict[str, Place]:
    """Part name -> its place, by the header of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: Place(path.name, 8 + length + begin, end - begin) for name, (begin, end) in found.items()}


def _open(path: Path):
    try:
        return safe_open(str(path), framework="pt")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read; {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file; {error}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, EncodedTensor], tied: Mapping[str, str] | None = None, own: Iterable[str] = ()
) -> None:  # fmt: skip
    """Writes the parts of `tensors` to `path`, one tensor in memory at a time.

    The file appears whole or not at all. The same tensors give the same bytes. `tied` are names that stand for another
    tensor's: alias to name. `own` are tensors that only smaller networks have, which are in the other's tensors.
    """
    descriptions, stored = {}, {}
    for name in tensors:
        tensor = tensors[name]
        parts = tensor.encoding.parts()
        descriptions[name] = {**_description(tensor), "parts": sorted(parts)}
        for part, values in parts.items():
            nbytes = values.numel() * values.element_size()
            stored[name, part] = StoredPart(_DTYPES[values.dtype], tuple(values.shape), nbytes)
    header, places = packed_header(descriptions, stored, dict(tied or {}), tuple(own))
    with whole(path) as partial, open(partial, "wb") as file:
        file.write(header)
        for name in tensors:
            parts = tensors[name].encoding.parts()
            for part in sorted(parts):
                file.seek(len(header) + places[name, part][0])
                file.write(parts[part].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
