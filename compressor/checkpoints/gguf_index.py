"""The index of a GGUF file, walked against the file's size before the gguf package reads it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package trusts the counts in the index: an array that
says to have 2⁶³ entries keeps it busy, and takes memory, without end.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from compressor.core.errors import CheckpointError

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type, for those of one size."""
MOST_DIMENSIONS, DEEPEST = 8, 4


def check_index(path: Path) -> None:
    """Refuses an index that asks for more than the file holds.

    Raises:
        CheckpointError: It does, or it has a type that is not known.
    """
    with path.open("rb") as file:
        try:
            _Walk(file, path.stat().st_size).index()
        except (EOFError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"{path}: is truncated or corrupt; it has {path.stat().st_size} bytes, and its index asks for more "
                f"({error}); fetch it again"
            ) from error


class _Walk:
    """Steps through the index, and never beyond the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.place, self.order = file, size, 0, "<"

    def index(self) -> None:
        self.skip(4)
        version = self.number("I")
        self.order = ">" if version & 0xFFFF == 0 else "<"  # as the package finds out
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        for _ in range(self.bounded(n_fields, 12)):
            self.string()
            self.value(self.number("I"), 0)
        for _ in range(self.bounded(n_tensors, 24)):
            self.string()
            n_dimensions = self.number("I")
            if n_dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {n_dimensions} dimensions")
            self.skip(8 * n_dimensions + 4 + 8)

    def value(self, kind: int, depth: int) -> None:
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == STRING:
            self.string()
        elif kind == ARRAY and depth < DEEPEST:
            inner, n = self.number("I"), self.number("Q")
            if inner in SIZES:
                self.skip(SIZES[inner] * n)
                return
            for _ in range(self.bounded(n, 8)):
                self.value(inner, depth + 1)
        else:
            raise ValueError(f"a value of type {kind}")

    def bounded(self, n: int, least: int) -> int:
        """A count of things of at least so many bytes each."""
        if n * least > self.size - self.place:
            raise EOFError(f"{n} entries")
        return n

    def string(self) -> None:
        self.skip(self.number("Q"))

    def number(self, code: str) -> int:
        n = struct.calcsize(code)
        (found,) = struct.unpack(self.order + code, self.file.read(n))
        self.place += n
        return found

    def skip(self, n: int) -> None:
        if n > self.size - self.place:
            raise EOFError(f"{n} bytes at {self.place}")
        self.place += n
        self.file.seek(self.place)
