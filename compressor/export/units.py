"""Codes that lie in planes, looked up some at a time.

onnxruntime frees nothing while it folds: what every node of every layer gives is there at once, so that few and small
arrays count. A unit is one code, or the two of which the widest plane holds a byte. Its index joins the planes' bits as
they lie, in 16 bits; the planes are read in shapes that match without a copy. Measured: docs/runtime.md.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compressor.export.builder import GraphBuilder
from compressor.export.parts import Parts, digits
from compressor.ops.widths import plane_widths

UINT8, UINT16, INT32 = ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.INT32
_LARGEST = 14
"""Bits of an index: its table of codewords is made for each tensor, and should stay in the cache."""


@dataclass(frozen=True)
class Unit:
    """`codes` codes of planes of `widths` bits, lowest bits first; `n` units a row."""

    codes: int
    widths: tuple[int, ...]
    n: int

    @classmethod
    def of(cls, width: int, n_codes: int) -> Unit | None:
        """The units of rows of `n_codes` codes; None where there is one plane, or rows end within bytes."""
        widths = plane_widths(width)
        codes = 2 if widths[0] == 4 and 2 * width <= _LARGEST else 1
        if len(widths) == 1 or n_codes % (8 // widths[-1]):
            return None
        return cls(codes, widths, n_codes // codes)

    @property
    def _bits(self) -> list[int]:
        """Of the index, from each plane."""
        return [self.codes * width for width in self.widths]

    def index(self, parts: Parts) -> ir.Value:
        """int32 (rows, …): the bits of the first plane lowest. Its axes after the first make one row together."""
        b, joined, shift = parts.builder, None, 0
        per = [8 // bits for bits in self._bits]  # units that a byte of each plane tells of
        factors = [one // before for before, one in itertools.pairwise([1, *per])]
        for number, (part, _) in enumerate(parts.planes()):
            outer = [self.n // per[-1], *reversed(factors[number + 1 :])]
            stored = parts.by_row(part, UINT8, *outer)
            if per[number] == 1:
                found = b.cast(stored, UINT16)
            else:
                shape = (256, *(factor for factor in reversed(factors[: number + 1]) if factor > 1))
                found = b.op("Gather", _table(b, self._bits[number], shift, shape), b.cast(stored, INT32))
            joined = found if joined is None else b.op("BitwiseOr", joined, found)
            shift += self._bits[number]
        assert joined is not None
        return b.cast(joined, INT32)

    def codes_of(self, b: GraphBuilder) -> ir.Value:
        """The codes of every index, int32 (2**bits, codes)."""
        return b.once(self, functools.partial(self._codes_of, b))

    def _codes_of(self, b: GraphBuilder) -> ir.Value:
        total, shift = None, 0
        for number, (width, bits) in enumerate(zip(self.widths, self._bits, strict=True)):
            values = (np.arange(2**bits)[:, None] >> width * np.arange(self.codes) & 2**width - 1) << shift
            piece = b.constant(values.astype(np.int32).reshape(2**bits, *[1] * number, self.codes))
            total, shift = piece if total is None else b.op("Add", total, piece), shift + width
        assert total is not None
        return b.reshape(total, math.prod(2**bits for bits in self._bits), self.codes)


def _table(b: GraphBuilder, bits: int, shift: int, shape: tuple[int, ...]) -> ir.Value:
    """A byte's digits of `bits` bits, shifted: uint16 of `shape`. All widths share the digits, which the file holds."""

    def make() -> ir.Value:
        moved = b.op("Mul", b.constant(digits(bits)), b.constant(np.array(2**shift, np.int32)))
        return b.reshape(b.cast(moved, UINT16), *shape)

    return b.once((bits, shift, shape), make)
