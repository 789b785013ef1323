"""The index of a GGUF file: what its metadata say, and where its tensors lie.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count is held against the file's size before anything
is made of it: an array that says to have 2⁶³ entries is refused, not waited for. Long arrays, such as a vocabulary, are
stepped over, so that a file of 262,144 tokens is open in a sixth of a second, where the gguf package's reader takes
eight.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoints.source import refuse_empty
from compressor.core.errors import CheckpointError

STRING, ARRAY = 8, 9
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Of `struct`, for values of one size, by their type."""
MOST_DIMENSIONS, DEEPEST, LONGEST = 8, 4, 4096
"""Dimensions of a tensor, arrays within arrays, and values of an array that is kept."""
ALIGNMENT = 32
"""Bytes to whose multiples tensors begin where the metadata do not say otherwise."""


@dataclass(frozen=True)
class Entry:
    """A tensor as it lies in the file.

    shape   rows first, as torch has it
    kind    ggml's number of how it is stored
    begin   its first byte, from the start of the file
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int


@dataclass(frozen=True)
class Index:
    """What a file says that it holds; long arrays and those of texts are None."""

    metadata: dict[str, Any]
    entries: tuple[Entry, ...]

    @property
    def architecture(self) -> Any:
        """What llama.cpp calls the network."""
        return self.metadata.get("general.architecture")

    def setting(self, key: str) -> Any:
        """A value that the metadata have for the architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_index(path: Path) -> Index:
    """The index of a file.

    Raises:
        CheckpointError: It is no GGUF file, asks for more than the file holds, or has a type that is not known.
    """
    refuse_empty(path)
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path}: is not a GGUF file; it starts with {magic!r}; give a file of llama.cpp")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Walk(view).index()
        except (EOFError, ValueError, struct.error, OverflowError) as error:
            raise CheckpointError(
                f"{path}: is truncated or corrupt; it has {path.stat().st_size} bytes, and its index asks for more "
                f"({error}); fetch it again"
            ) from error


class _Walk:
    """Steps through the index, and never beyond the end of the file."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view, self.size, self.place = view, len(view), 0

    def index(self) -> Index:
        self.skip(4)
        version = self.number("I")
        if not version & 0xFFFF:
            raise ValueError("numbers are in the byte order of another processor")
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.bounded(n_fields, 12)):
            name = self.text()
            metadata[name] = self.value(self.number("I"), 0)
        found = [self.entry() for _ in range(self.bounded(n_tensors, 24))]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        begin = -(-self.place // alignment) * alignment
        if len({name for name, *_ in found}) < len(found):
            raise ValueError("two tensors of one name")
        return Index(metadata, tuple(Entry(name, shape, kind, begin + at) for name, shape, kind, at in found))

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, kind and place among the tensors of the next one."""
        name, n = self.text(), self.number("I")
        if n > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {n} dimensions")
        shape = tuple(self.number("Q") for _ in range(n))[::-1]
        if math.prod(shape) > 16 * self.size:
            raise EOFError(f"a tensor of shape {shape}")
        return name, shape, self.number("I"), self.number("Q")

    def value(self, kind: int, depth: int) -> Any:
        if kind in CODES:
            return self.number(CODES[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth >= DEEPEST:
            raise ValueError(f"a value of type {kind}")
        inner, n = self.number("I"), self.number("Q")
        if inner not in CODES:
            for _ in range(self.bounded(n, 8)):
                self.skip(self.number("Q")) if inner == STRING else self.value(inner, depth + 1)
            return None
        if n > LONGEST:
            return self.skip(n * struct.calcsize("<" + CODES[inner]))
        return [self.number(CODES[inner]) for _ in range(n)]

    def bounded(self, n: int, least: int) -> int:
        """A count of things of at least so many bytes each."""
        if n * least > self.size - self.place:
            raise EOFError(f"{n} entries")
        return n

    def text(self) -> str:
        begin = self.place + 8
        self.skip(self.number("Q"))
        return self.view[begin : self.place].decode("utf-8", "replace")

    def number(self, code: str) -> Any:
        begin = self.place
        self.skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.view, begin)[0]

    def skip(self, n: int) -> None:
        if n > self.size - self.place:
            raise EOFError(f"{n} bytes at {self.place}")
        self.place += n
