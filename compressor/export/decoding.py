"""`Encoding.decode()` as graph nodes, for whole tensors (folded at load) or for the rows that an embedding asks for.

Only operators of ai.onnx, opset 13. Over a whole tensor every input is constant, so onnxruntime folds the nodes away;
with `rows` the gathered rows alone are unpacked at run time, which costs no memory and little time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.export.forms import Plane, coded
from compressor.export.parts import Parts, byte_digits, digits
from compressor.export.states import states

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
    stored = parts.values(ir.DataType.FLOAT16 if half else FLOAT, parts.n_rows, parts.columns)
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
    b, codes = parts.builder, parts.codes
    levels = coded(parts.description).levels(parts.description)
    if levels is None:
        return _codewords(parts, rows)
    if len(codes.planes) == 1 and codes.planes[0].per > 1:
        return _by_table(parts, np.array(levels, np.float32), rows)
    found = b.cast(unpacked(parts, "codes", codes.n, rows), FLOAT)  # such levels are a step apart
    return b.op("Sub", found, b.constant(-levels[0])) if levels[0] else found


def _by_table(parts: Parts, levels: np.ndarray, rows: ir.Value | None) -> ir.Value:
    """A single plane's bytes looked up: float32 (rows, n_codes)."""
    b, n_codes = parts.builder, parts.codes.n
    part, plane = parts.planes()[0]
    index = _index(parts, part, plane, n_codes, rows)
    have = plane.stored(n_codes) * plane.per
    values = b.reshape(b.op("Gather", b.constant(levels[byte_digits(plane)]), index), -1, have)
    return b.slice(values, n_codes, 1) if have != n_codes else values


def unpacked(parts: Parts, stem: str, n_codes: int, rows: ir.Value | None = None) -> ir.Value:
    """Codes or zeros one by one, int32 (rows, n_codes)."""
    b, total, step = parts.builder, None, 1
    for part, plane in parts.planes(stem):
        index = _index(parts, part, plane, n_codes, rows)
        if plane.per > 1:
            have = plane.stored(n_codes) * plane.per
            index = b.reshape(b.op("Gather", b.constant(byte_digits(plane) * np.int32(step)), index), -1, have)
            index = b.slice(index, n_codes, 1) if have != n_codes else index
        elif step > 1:
            index = b.op("Mul", index, b.constant(np.array(step, np.int32)))
        total, step = index if total is None else b.op("Add", total, index), step * plane.radix
    assert total is not None
    return total


def _index(parts: Parts, part: str, plane: Plane, n_codes: int, rows: ir.Value | None) -> ir.Value:
    if rows is None:
        return parts.plane_index(part, plane, n_codes)
    stored = parts.stored(part, plane, n_codes)
    return parts.builder.cast(parts.builder.op("Gather", stored, rows, axis=0), INT32)


def _codewords(parts: Parts, rows: ir.Value | None) -> ir.Value:
    b, description = parts.builder, parts.description
    dim, books = description["dim"], len(description["counts"])
    n_codes, width = parts.codes.n, description["width"]
    entries = books * 2 ** description.get("window", width)
    if description["grid"] == "int4":
        packed = b.cast(parts.whole("table", ir.DataType.UINT8, entries * dim // 2), INT32)
        table = b.op("Gather", b.constant(digits(4).astype(np.float32) - 8), packed)
    else:
        table = b.cast(parts.whole("table", ir.DataType.FLOAT16, entries * dim), FLOAT)
    if "window" in description:
        assert rows is None  # `forms` refuses tables of rows
        index = states(parts, lambda values: _bytes_of(parts, values, n_codes))
    else:
        index = unpacked(parts, "codes", n_codes, rows)
    book = parts.book_offsets(2**width)
    if book is not None:
        index = b.op("Add", index, book if rows is None else b.op("Gather", book, rows, axis=0))
    return b.reshape(b.op("Gather", b.reshape(table, entries, dim), index), -1, n_codes * dim)


def _bytes_of(parts: Parts, values: tuple[int, ...], n_codes: int) -> ir.Value:
    """What each code becomes, uint8 (rows, n_codes)."""
    b = parts.builder
    return b.op("Gather", b.constant(np.array(values, np.uint8)), unpacked(parts, "codes", n_codes))
