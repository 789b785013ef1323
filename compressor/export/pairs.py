"""Look-ups of two bytes at a time: half as many indices, each of which takes four bytes or eight while it folds.

A table of all pairs is made of the bytes' own by nodes, once for a graph, since the file should not hold it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compressor.export.builder import GraphBuilder
from compressor.export.forms import Plane
from compressor.export.parts import Parts

_WORTH_IT = 1 << 17
"""Bytes of a part from which a table of pairs pays."""


def planes_in_pairs(
    parts: Parts, planes: Sequence[tuple[str, Plane]], n_codes: int, tables: Sequence[np.ndarray], needed: int
) -> ir.Value | None:
    """The bytes that each plane's become by its table, uint8 (256, bytes), joined by OR: (rows, …), `needed` a row.

    None where the rows of a plane end within a pair or the parts are small.
    """
    b = parts.builder
    pairs = [plane.stored(n_codes) // 2 for _, plane in planes]
    made = [2 * table.shape[1] for table in tables]
    even = all(plane.nbytes == 1 and plane.stored(n_codes) % 2 == 0 and parts.even(part) for part, plane in planes)
    whole = {n * nbytes for n, nbytes in zip(pairs, made, strict=True)} == {needed}
    if not even or not whole or 2 * pairs[-1] * parts.n_rows < _WORTH_IT:
        return None
    factors = [wide // narrow for narrow, wide in itertools.pairwise(made)]
    joined = None
    for at, (part, _) in enumerate(planes):
        stored = parts.by_row(part, ir.DataType.UINT16, pairs[-1], *reversed(factors[at:]))
        shape = (1 << 16, *reversed(factors[:at]), made[0])
        found = b.op("Gather", pair_table(b, tables[at], shape), b.cast(stored, ir.DataType.INT32))
        joined = found if joined is None else b.op("BitwiseOr", joined, found)
    return joined


def pair_table(b: GraphBuilder, table: np.ndarray, shape: tuple[int, ...]) -> ir.Value:
    """What two bytes become, the first one's before the second's: `shape` of (65536, 2 · bytes)."""
    return b.once((table.tobytes(), shape), functools.partial(_side_by_side, b, table, shape))


def _side_by_side(b: GraphBuilder, table: np.ndarray, shape: tuple[int, ...]) -> ir.Value:
    every, n = b.integers(256, 256, table.shape[1]), b.constant(table)
    both = [b.op("Expand", b.op("Unsqueeze", n, b.integers(axis)), every) for axis in (0, 1)]
    return b.reshape(b.op("Concat", *both, axis=2), *shape)


def nibbles_in_pairs(b: GraphBuilder, table: np.ndarray) -> ir.Value:
    """A byte for every pair of bytes, uint8 (65536,): what the first becomes by `table` lowest."""

    def make() -> ir.Value:
        low, high = b.constant(table[None, :]), b.constant((table << 4)[:, None])
        return b.reshape(b.op("BitwiseOr", low, high), 1 << 16)

    return b.once((table.tobytes(), "nibbles"), make)
