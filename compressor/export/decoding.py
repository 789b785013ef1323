"""`Encoding.decode()` as graph nodes, for whole tensors (folded at load) or for the rows that an embedding asks for.

Only operators of ai.onnx, opset 13. Over a whole tensor every input is constant, so onnxruntime folds the nodes away;
with `rows` the gathered rows alone are unpacked at run time, which costs no memory and little time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.export.forms import stored_codes
from compressor.export.parts import Parts, digits
from compressor.ops.widths import packed_columns

INT32, FLOAT = ir.DataType.INT32, ir.DataType.FLOAT


def decoded(parts: Parts, rows: ir.Value | None = None) -> ir.Value:
    """float32 (rows, columns) of the matrix; `rows` int64 (n,) selects some."""
    b = parts.builder
    if parts.description["kind"] == "dense":
        return _dense(parts, rows)
    stored_rows = rows
    if parts.has("order") and rows is not None:
        stored_rows = b.op("Gather", parts.inverse_order(), rows)
    values = _values(parts, stored_rows)
    grouped = b.reshape(values, -1, parts.groups, parts.group)
    if parts.has("zeros") or parts.has("zeros.0"):
        zeros = zero_points(parts, stored_rows)
        grouped = b.op("Sub", grouped, b.op("Unsqueeze", zeros, b.integers(2)))
    scales = parts.scales()
    if stored_rows is not None and parts.scale_shape[0] > 1:
        scales = _gathered_scales(parts, stored_rows)
    scaled = b.op("Mul", grouped, b.op("Unsqueeze", scales, b.integers(2)))
    padded = parts.groups * parts.group
    matrix = b.reshape(scaled, -1, padded)
    matrix = b.slice(matrix, parts.columns, 1) if padded != parts.columns else matrix
    if parts.has("order") and rows is None:
        return b.op("Gather", matrix, parts.inverse_order(), axis=0)
    return matrix


def zero_points(parts: Parts, rows: ir.Value | None = None) -> ir.Value:
    """Each group's own zero point, float32 (rows, groups)."""
    b = parts.builder
    zeros = b.cast(unpacked(parts, "zeros", parts.groups, rows), FLOAT)
    return zeros if parts.zero_steps == 1 else b.op("Mul", zeros, b.constant(1 / parts.zero_steps))


def _dense(parts: Parts, rows: ir.Value | None) -> ir.Value:
    b = parts.builder
    half = parts.nbytes("weight") == 2 * parts.n_rows * parts.columns
    stored = parts.whole("weight", ir.DataType.FLOAT16 if half else FLOAT, parts.n_rows, parts.columns)
    stored = stored if rows is None else b.op("Gather", stored, rows, axis=0)
    return b.cast(stored, FLOAT) if half else stored


def _gathered_scales(parts: Parts, rows: ir.Value) -> ir.Value:
    b = parts.builder
    if not parts.has("row_scales"):
        stored = parts.whole("scales", ir.DataType.FLOAT16, parts.n_rows, parts.groups)
        return b.cast(b.op("Gather", stored, rows, axis=0), FLOAT)
    shares = b.op("Gather", parts.whole("scales", ir.DataType.UINT8, parts.n_rows, parts.groups), rows, axis=0)
    row = b.op("Gather", parts.whole("row_scales", ir.DataType.FLOAT16, parts.n_rows, 1), rows, axis=0)
    return b.op("Mul", b.cast(shares, FLOAT), b.op("Div", b.cast(row, FLOAT), b.constant(255.0)))


def _values(parts: Parts, rows: ir.Value | None) -> ir.Value:
    """What the scales multiply, float32 (rows, padded columns), before a zero tensor is taken off."""
    b, description = parts.builder, parts.description
    n_codes, _ = stored_codes(description)
    if description["kind"] == "codebook":
        return _codewords(parts, rows)
    if description["kind"] == "binary":
        return _by_table(parts, 2.0 * digits(1).astype(np.float32) - 1.0, n_codes, rows)
    zero = description["zero"] or 0.0
    if description["bits"] in (2, 4):
        table = digits(description["bits"]).astype(np.float32) - np.float32(zero)
        return _by_table(parts, table, n_codes, rows)
    codes = b.cast(unpacked(parts, "codes", n_codes, rows), FLOAT)
    return b.op("Sub", codes, b.constant(float(zero))) if zero else codes


def _by_table(parts: Parts, table: np.ndarray, n_codes: int, rows: ir.Value | None) -> ir.Value:
    """A single plane's bytes looked up: float32 (rows, n_codes)."""
    b = parts.builder
    part, width = parts.planes()[0]
    index = _index(parts, part, width, n_codes, rows)
    have = packed_columns(n_codes, width) * 8 // width
    values = b.reshape(b.op("Gather", b.constant(table), index), -1, have)
    return b.slice(values, n_codes, 1) if have != n_codes else values


def unpacked(parts: Parts, stem: str, n_codes: int, rows: ir.Value | None = None) -> ir.Value:
    """Codes or zeros one by one, int32 (rows, n_codes)."""
    b, total, shift = parts.builder, None, 0
    for part, width in parts.planes(stem):
        index = _index(parts, part, width, n_codes, rows)
        if width < 8:
            have = packed_columns(n_codes, width) * 8 // width
            index = b.reshape(b.op("Gather", b.constant(digits(width) << shift), index), -1, have)
            index = b.slice(index, n_codes, 1) if have != n_codes else index
        elif shift:
            index = b.op("Mul", index, b.constant(np.array(2**shift, np.int32)))
        total, shift = index if total is None else b.op("Add", total, index), shift + width
    assert total is not None
    return total


def _index(parts: Parts, part: str, width: int, n_codes: int, rows: ir.Value | None) -> ir.Value:
    if rows is None:
        return parts.plane_index(part, width, n_codes)
    shape = (ir.DataType.UINT16, n_codes) if width == 16 else (ir.DataType.UINT8, packed_columns(n_codes, width))
    return parts.builder.cast(parts.builder.op("Gather", parts.by_row(part, *shape), rows, axis=0), INT32)


def _codewords(parts: Parts, rows: ir.Value | None) -> ir.Value:
    b, description = parts.builder, parts.description
    dim, books = description["dim"], len(description["counts"])
    n_codes, width = stored_codes(description)
    entries = books * 2**width
    if description["grid"] == "int4":
        packed = b.cast(parts.whole("table", ir.DataType.UINT8, entries * dim // 2), INT32)
        table = b.op("Gather", b.constant(digits(4).astype(np.float32) - 8), packed)
    else:
        table = b.cast(parts.whole("table", ir.DataType.FLOAT16, entries * dim), FLOAT)
    index = unpacked(parts, "codes", n_codes, rows)
    book = parts.book_offsets(2**width)
    if book is not None:
        index = b.op("Add", index, book if rows is None else b.op("Gather", book, rows, axis=0))
    return b.reshape(b.op("Gather", b.reshape(table, entries, dim), index), -1, n_codes * dim)
