"""The stored parts of encoded tensors as graph values: external initialisers, and arithmetic that folds at load."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from compressor.core.tensors import EncodedTensors, Place, part_name
from compressor.export.builder import GraphBuilder
from compressor.export.forms import FOLD_LIMIT, Codes, Plane, coded, planes_of
from compressor.ops.widths import n_groups, rows_before, zero_bits

_SIZES = {
    ir.DataType.UINT8: 1,
    ir.DataType.UINT16: 2,
    ir.DataType.FLOAT16: 2,
    ir.DataType.INT32: 4,
    ir.DataType.FLOAT: 4,
}


def digits(width: int) -> np.ndarray:
    """The codes of `width` bits in every byte, int32 (256, 8 / width), lowest bits first."""
    return byte_digits(Plane.of_bits(width))


def byte_digits(plane: Plane) -> np.ndarray:
    """The digits of every byte, int32 (256, digits)."""
    return (np.arange(256)[:, None] // plane.radix ** np.arange(plane.per) % plane.radix).astype(np.int32)


class Parts:
    """Views of the parts of one tensor; `rows` = (start, stop) restricts row-wise parts to some stored rows."""

    def __init__(
        self, builder: GraphBuilder, tensors: EncodedTensors, name: str, rows: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.builder, self._tensors = builder, tensors
        self.name = tensors.tied.get(name, name)
        self.description: dict[str, Any] = tensors.describe(name)
        self.n_rows, self.columns = self.description["shape"]
        self.rows = rows or (0, self.n_rows)

    def has(self, part: str) -> bool:
        return part in self.description["parts"]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix in the file, of which these may be the first."""
        rows, columns = self.description.get("stored", (self.n_rows, self.columns))
        return rows, columns

    def nbytes(self, part: str) -> int:
        """Of the part as far as it is this tensor's."""
        nbytes, (rows, columns) = self._tensors.place(self.name, part).nbytes, self.stored_shape
        if (rows, columns) == (self.n_rows, self.columns) or nbytes == 2:  # a single scale
            return nbytes
        return (
            nbytes // (rows * columns) * self.n_rows * self.columns
            if part == "weight"
            else nbytes // rows * self.n_rows
        )

    def even(self, part: str) -> bool:
        """Whether a row of the part is a whole number of pairs of bytes in the file."""
        before = self.before if part.startswith("codes") else 0
        return self._tensors.place(self.name, part).nbytes // (self.stored_shape[0] + before) % 2 == 0

    def values(self, dtype: ir.DataType, *shape: int) -> ir.Value:
        """The values of what is stored as it is, in this shape."""
        return (
            self.by_row("weight", dtype, *shape[1:])
            if "stored" in self.description
            else self.whole("weight", dtype, *shape)
        )

    def whole(self, part: str, dtype: ir.DataType, *shape: int) -> ir.Value:
        """The part as an initialiser of this shape."""
        return self._view(part, self._tensors.place(self.name, part), dtype, shape)

    def by_row(self, part: str, dtype: ir.DataType, *shape: int) -> ir.Value:
        """Rows `self.rows` of a row-wise part as an initialiser (rows, *shape); of codes with the rows before.

        Where rows are longer in the file than these columns take, the rest is cut off, which onnxruntime folds.
        """
        place = self._tensors.place(self.name, part)
        before = self.before if part.startswith("codes") else 0
        start, stop = self.rows[0], self.rows[1] + before
        row_bytes = place.nbytes // (self.stored_shape[0] + before)
        some = Place(place.file, place.offset + start * row_bytes, (stop - start) * row_bytes)
        wanted, behind = math.prod(shape), math.prod(shape[1:])
        if wanted * _SIZES[dtype] == row_bytes or "stored" not in self.description:
            return self._view(part, some, dtype, (stop - start, *shape))
        there = row_bytes // _SIZES[dtype]
        cut, of = (wanted, there) if there % behind else (shape[0], there // behind)
        longer = self._view(part, some, dtype, (stop - start, of, *(() if there % behind else shape[1:])))
        shorter = self.builder.once(("beginning", longer.name, cut), lambda: self.builder.slice(longer, cut, 1))
        return self.builder.reshape(shorter, stop - start, *shape) if there % behind and len(shape) > 1 else shorter

    def _view(self, part: str, place: Place, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        full = part_name(self.name, part)
        if math.prod(shape) * _SIZES[dtype] != place.nbytes:
            raise AssertionError(f"{full}: {place.nbytes} bytes do not hold {dtype.name}{list(shape)}")
        label = full if (dtype, shape) == (ir.DataType.FLOAT, tuple(self.description["tensor_shape"])) else (
            f"{full}@{place.offset}:{dtype.name.lower()}{'x'.join(map(str, shape))}")  # fmt: skip
        return self.builder.external(label, place.file, place.offset, place.nbytes, dtype, shape)

    @property
    def groups(self) -> int:
        return n_groups(self.columns, self.description.get("group", self.columns))

    @property
    def group(self) -> int:
        return self.description.get("group", self.columns)

    @property
    def before(self) -> int:
        """Rows of codes before the matrix's first."""
        return rows_before(self.description.get("width", 1), self.description.get("window"))

    @property
    def zero_steps(self) -> int:
        """Zero points are stored in parts of 1/steps."""
        return self.description.get("zero_steps", 1)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Rows and groups of the stored scales; (1, 1) where there is a single one for all."""
        if not self.has("row_scales") and self.nbytes("scales") == 2:
            return 1, 1
        return self.n_rows, self.groups

    @property
    def codes(self) -> Codes:
        """How the codes of a row lie."""
        return coded(self.description).codes(self.description)

    def planes(self, stem: str = "codes") -> list[tuple[str, Plane]]:
        """(part, plane) of `codes` or `zeros`, lowest digits first."""
        zeros = stem == "zeros"
        planes = planes_of(zero_bits(self.description["bits"], self.zero_steps)) if zeros else self.codes.planes
        return [(stem if len(planes) == 1 else f"{stem}.{i}", plane) for i, plane in enumerate(planes)]

    def stored(self, part: str, plane: Plane, n_codes: int) -> ir.Value:
        """The bytes (or pairs of bytes) of a plane, (rows, n)."""
        dtype = ir.DataType.UINT8 if plane.nbytes == 1 else ir.DataType.UINT16
        return self.by_row(part, dtype, plane.stored(n_codes) // plane.nbytes)

    def plane_index(self, part: str, plane: Plane, n_codes: int) -> ir.Value:
        """The same as int32."""
        return self.builder.cast(self.stored(part, plane, n_codes), ir.DataType.INT32)

    def scales(self) -> ir.Value:
        """The scales as stored, decoded to float32 (rows, groups)."""
        if not self.has("row_scales"):
            if self.scale_shape == (1, 1):
                return self.builder.cast(self.whole("scales", ir.DataType.FLOAT16, 1, 1), ir.DataType.FLOAT)
            return self.builder.cast(self.by_row("scales", ir.DataType.FLOAT16, self.groups), ir.DataType.FLOAT)
        shares = self.builder.cast(self.by_row("scales", ir.DataType.UINT8, self.groups), ir.DataType.FLOAT)
        row = self.builder.cast(self.by_row("row_scales", ir.DataType.FLOAT16, 1), ir.DataType.FLOAT)
        return self.builder.op("Mul", shares, self.builder.op("Div", row, self.builder.constant(255.0)))

    def inverse_order(self) -> ir.Value:
        """int64 (rows,): where row i of the matrix is stored."""
        b = self.builder
        dtype = ir.DataType.UINT16 if self.n_rows <= 65536 else ir.DataType.INT32
        order = b.cast(self.whole("order", dtype, self.n_rows), ir.DataType.INT64)
        count = b.op("Range", *(b.constant(np.array(n, np.int64)) for n in (0, self.n_rows, 1)))
        return b.op("ScatterElements", count, order, count, axis=0)

    def book_offsets(self, entries: int) -> ir.Value | None:
        """int32 (rows, 1): the first table entry of each row's codebook; None where there is one codebook."""
        counts = self.description["counts"]
        if len(counts) == 1:
            return None
        b = self.builder
        limits = np.cumsum(counts)[:-1].astype(np.int64)[None, :]
        rows = b.op("Range", *(b.constant(np.array(n, np.int64)) for n in (*self.rows, 1)))
        passed = b.op("GreaterOrEqual", b.op("Unsqueeze", rows, b.integers(1)), b.constant(limits))
        book = b.op("ReduceSum", b.cast(passed, ir.DataType.INT32), b.integers(1), keepdims=1)
        return b.op("Mul", book, b.constant(np.array(entries, np.int32)))

    def pieces(self) -> list[Parts]:
        """Row ranges small enough that no index array passes onnxruntime's limit of folded bytes."""
        codes = self.codes
        per_row = 4 * (codes.n if codes.one_by_one else codes.planes[0].stored(codes.n))
        step = max(1, int(0.9 * FOLD_LIMIT) // max(per_row, 1))
        return [self.piece(start, min(start + step, self.n_rows)) for start in range(0, self.n_rows, step)]

    def piece(self, start: int, stop: int) -> Parts:
        piece = Parts.__new__(Parts)
        piece.__dict__.update(self.__dict__, rows=(start, stop))
        return piece
