"""Operands of `MatMulNBits` from stored parts: through nodes that onnxruntime folds at load, or directly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.export.decoding import unpacked
from compressor.export.forms import Form, Plane
from compressor.export.pairs import nibbles_in_pairs, planes_in_pairs
from compressor.export.parts import Parts, byte_digits, digits
from compressor.export.states import states
from compressor.export.units import Unit
from compressor.ops.widths import FINE_BITS, packed_columns, plane_widths, zero_bits

UINT8 = ir.DataType.UINT8


def byte_table(plane: Plane, values: tuple[int, ...], kernel_bits: int) -> np.ndarray:
    """What each byte of codes becomes: uint8 (256, bytes of its digits' values of `kernel_bits`)."""
    per = 8 // kernel_bits
    wide = np.array(values, np.uint8)[byte_digits(plane)].reshape(256, -1, per)
    return np.bitwise_or.reduce(wide << np.arange(0, 8, kernel_bits, dtype=np.uint8), axis=-1).astype(np.uint8)


def kernel_codes(parts: Parts, form: Form) -> ir.Value:
    """The operand B: uint8 (rows, blocks, bytes of a block), rows in the order of the matrix."""
    b = parts.builder
    blocks, block_bytes = -(-parts.columns // form.block), form.block * form.bits // 8
    codes = parts.codes
    if form.direct:
        have = codes.planes[0].stored(codes.n)
        if have == blocks * block_bytes:
            return parts.by_row("codes", UINT8, blocks, block_bytes)
        rows = parts.by_row("codes", UINT8, have)
    else:
        have = packed_columns(codes.n * parts.description.get("dim", 1), form.bits)
        some = parts.pieces()
        pieces = [_looked_up(piece, form, have != blocks * block_bytes or len(some) > 1) for piece in some]
        rows = pieces[0] if len(pieces) == 1 else b.op("Concat", *pieces, axis=0)
    shaped = b.reshape(_fitted(parts, rows, have, blocks * block_bytes), -1, blocks, block_bytes)
    return b.op("Gather", shaped, parts.inverse_order(), axis=0) if parts.has("order") else shaped


def kernel_scales(parts: Parts, form: Form) -> ir.Value:
    """The operand scales: float32 (rows, blocks)."""
    b = parts.builder
    scales = parts.scales()
    if form.factor != 1.0:
        scales = b.op("Mul", scales, b.constant(form.factor))
    scales = _per_block(parts, scales, form)
    return b.op("Gather", scales, parts.inverse_order(), axis=0) if parts.has("order") else scales


def kernel_zeros(parts: Parts, form: Form) -> ir.Value | None:
    """The operand zero_points: packed uint8 (rows, bytes), or None for the kernel's default."""
    b = parts.builder
    blocks = -(-parts.columns // form.block)
    zero_bytes = packed_columns(blocks, form.bits)
    if form.zero is not None:
        byte = sum(form.zero << shift for shift in range(0, 8, form.bits))
        return b.op("Expand", b.constant(np.array([byte], np.uint8)), b.integers(parts.n_rows, zero_bytes))
    if parts.description.get("zero", 0) is not None:
        return None
    if form.direct and blocks == parts.groups and not form.shifted:
        return parts.by_row("zeros", UINT8, zero_bytes)
    if blocks == parts.groups and not form.shifted:
        values = tuple(range(2 ** zero_bits(parts.description["bits"], parts.zero_steps)))
        return _ored_planes(parts, values, form.bits, "zeros", blocks)
    if blocks == parts.groups and form.bits == 4 and blocks % 2 == 0 and parts.even("zeros"):
        stored = parts.by_row("zeros", ir.DataType.UINT16, zero_bytes)
        return b.op("Gather", nibbles_in_pairs(b, _whole(parts).astype(np.uint8)), b.cast(stored, ir.DataType.INT32))
    zeros = unpacked(parts, "zeros", parts.groups)
    if form.shifted:
        zeros = b.op("Gather", b.constant(_whole(parts).astype(np.int32)), zeros)
    spread = _per_block(parts, zeros, form)
    return _packed(parts, spread, blocks, form.bits)


def kernel_shifts(parts: Parts) -> ir.Value:
    """What a group's inputs are multiplied by, beside the product with whole zero points: float32 (rows, groups)."""
    b = parts.builder
    between = b.constant(_whole(parts) - _points(parts))
    return b.op(
        "Mul",
        parts.scales(),
        b.op("Gather", between, parts.plane_index("zeros", Plane.of_bits(FINE_BITS), parts.groups)),
    )


def _points(parts: Parts) -> np.ndarray:
    """The zero point that each byte of fine ones says, float32 (256,)."""
    return np.arange(256, dtype=np.float32) * np.float32(1 / parts.zero_steps)


def _whole(parts: Parts) -> np.ndarray:
    """The codes nearest to them, float32 (256,)."""
    return np.minimum(np.round(_points(parts)), np.float32(2 ** parts.description["bits"] - 1))


def _looked_up(parts: Parts, form: Form, flat: bool) -> ir.Value:
    """Kernel bytes of the stored rows, uint8, one row after another; (rows, bytes) if `flat`."""
    if form.values is None:
        return _codewords(parts, flat)
    if all(plane.per * form.bits % 8 == 0 for plane in parts.codes.planes):
        return _ored_planes(parts, form.values, form.bits, "codes", parts.codes.n, flat)
    return _packed_digits(parts, form.values, form.bits)


def _packed_digits(parts: Parts, values: tuple[int, ...], kernel_bits: int) -> ir.Value:
    """A byte's digits are no whole number of kernel bytes: each is looked up by itself, and then packed."""
    b, (part, plane), n_codes = parts.builder, parts.planes()[0], parts.codes.n
    table = np.array(values, np.int32)[byte_digits(plane)]
    found = b.op("Gather", b.constant(table), parts.plane_index(part, plane, n_codes))
    have = plane.stored(n_codes) * plane.per
    return _packed(parts, _shortened(parts, b.reshape(found, -1, have), have, n_codes), n_codes, kernel_bits)


def _packed(parts: Parts, values: ir.Value, n: int, bits: int) -> ir.Value:
    """Numbers of `bits` bits, int32 (rows, n), in bytes: uint8 (rows, bytes)."""
    b, per = parts.builder, 8 // bits
    padded = _padded(parts, values, n, packed_columns(n, bits) * per)
    weights = b.constant((2 ** np.arange(0, 8, bits)).astype(np.int32))
    grouped = b.op("Mul", b.reshape(padded, parts.rows[1] - parts.rows[0], -1, per), weights)
    return b.cast(b.op("ReduceSum", grouped, b.integers(2), keepdims=0), UINT8)


def _ored_planes(
    parts: Parts, values: tuple[int, ...], kernel_bits: int, stem: str, n_codes: int, flat: bool = True
) -> ir.Value:
    """Each plane's bytes looked up; they hold separate bits, so OR joins them. (rows, bytes) if `flat`."""
    b, step, joined = parts.builder, 1, None
    needed, planes, tables = packed_columns(n_codes, kernel_bits), [], []
    for part, plane in parts.planes(stem):
        base = values[0] if step > 1 else 0
        table = byte_table(plane, tuple(values[i * step] - base for i in range(plane.radix)), kernel_bits)
        if table.any():  # what a plane adds
            planes.append((part, plane))
            tables.append(table)
        step *= plane.radix
    paired = planes_in_pairs(parts, planes, n_codes, tables, needed)
    if paired is not None:
        return b.reshape(paired, -1, needed) if flat else paired
    for (part, plane), table in zip(planes, tables, strict=True):
        rows = b.op("Gather", b.constant(table), parts.plane_index(part, plane, n_codes))
        have = plane.stored(n_codes) * table.shape[1]
        rows = _fitted(parts, b.reshape(rows, -1, have), have, needed)
        joined = rows if joined is None else b.op("BitwiseOr", joined, rows)
    assert joined is not None
    return joined


def _codewords(parts: Parts, flat: bool) -> ir.Value:
    """Codewords of a table on the int4 grid, as stored (+8), for every code; (rows, bytes) if `flat`."""
    b, description = parts.builder, parts.description
    dim, books = description["dim"], len(description["counts"])
    n_codes, width = parts.codes.n, description["width"]
    if "window" in description:
        entry_bytes, entries, n_index = dim // 2, 2 ** description["window"], n_codes
        index = states(parts, lambda values: _ored_planes(parts, values, 8, "codes", n_codes, False))
        table = parts.whole("table", UINT8, entries, entry_bytes)
    elif dim == 1 and width == 3:
        planes = _ored_planes(parts, tuple(range(8)), 4, "codes", n_codes)
        index, table, entry_bytes, entries = b.cast(planes, ir.DataType.INT32), _byte_codewords(parts, 4), 1, 256
        n_index = packed_columns(n_codes, 4)
    elif width < 8 and len(plane_widths(width)) == 1:
        index, table = parts.plane_index("codes", parts.codes.planes[0], n_codes), _byte_codewords(parts, width)
        entry_bytes, entries, n_index = 8 // width * dim // 2, 256, packed_columns(n_codes, width)
    elif (unit := Unit.of(width, n_codes)) is not None:
        index, table = unit.index(parts), _unit_codewords(parts, unit)
        entry_bytes, entries, n_index = unit.codes * dim // 2, 2 ** (unit.codes * width), n_codes // unit.codes
    else:
        entry_bytes, entries, n_index = dim // 2, 2**width, n_codes
        index = unpacked(parts, "codes", n_codes)
        table = parts.whole("table", UINT8, books * entries, entry_bytes)
    book = parts.book_offsets(entries)
    if book is not None:
        index = b.op("Add", b.reshape(index, -1, n_index), book)
    have, needed = n_index * entry_bytes, packed_columns(n_codes * dim, 4)
    found = b.op("Gather", table, index)
    return _fitted(parts, b.reshape(found, -1, have), have, needed) if flat or have != needed else found


def _unit_codewords(parts: Parts, unit: Unit) -> ir.Value:
    """The codewords of a unit's codes side by side: uint8 (n_codebooks · units, bytes)."""
    b, description = parts.builder, parts.description
    books, entries, entry_bytes = len(description["counts"]), 2 ** description["width"], description["dim"] // 2
    if unit.codes == 1:
        return parts.whole("table", UINT8, books * entries, entry_bytes)
    table = parts.whole("table", UINT8, books, entries, entry_bytes)
    return b.reshape(b.op("Gather", table, unit.codes_of(b), axis=1), -1, unit.codes * entry_bytes)


def _byte_codewords(parts: Parts, slot: int) -> ir.Value:
    """The table for a whole byte of codes in slots of `slot` bits: uint8 (n_codebooks · 256, bytes)."""
    b, description = parts.builder, parts.description
    dim, books = description["dim"], len(description["counts"])
    entries = 2 ** description["width"]
    codes = b.constant(digits(slot) % entries)
    if dim > 1:
        table = parts.whole("table", UINT8, books, entries, dim // 2)
        return b.reshape(b.op("Gather", table, codes, axis=1), books * 256, 8 // slot * dim // 2)
    packed = b.cast(parts.whole("table", UINT8, books, entries // 2), ir.DataType.INT32)
    nibbles = b.reshape(b.op("Gather", b.constant(digits(4)), packed), books, entries)
    pairs = b.reshape(b.op("Gather", nibbles, codes, axis=1), books * 256, 4 // slot, 2)
    weighted = b.op("Mul", pairs, b.constant(np.array([1, 16], np.int32)))
    return b.cast(b.op("ReduceSum", weighted, b.integers(2), keepdims=0), UINT8)


def _per_block(parts: Parts, values: ir.Value, form: Form) -> ir.Value:
    """Values per group, (rows or 1, groups), to values per kernel block, (rows, blocks)."""
    b = parts.builder
    rows, groups = parts.scale_shape
    blocks = -(-parts.columns // form.block)
    if groups == 1:
        whole = (rows, blocks) == (parts.n_rows, 1)
        return values if whole else b.op("Expand", values, b.integers(parts.n_rows, blocks))
    if parts.group == form.block:
        return values
    per = parts.group // form.block
    spread = b.op("Expand", b.op("Unsqueeze", values, b.integers(2)), b.integers(rows, groups, per))
    return _shortened(parts, b.reshape(spread, rows, groups * per), groups * per, blocks)


def _fitted(parts: Parts, rows: ir.Value, have: int, needed: int) -> ir.Value:
    """Rows of `have` bytes cut or zero-padded to `needed`."""
    return _shortened(parts, rows, have, needed) if have >= needed else _padded(parts, rows, have, needed)


def _shortened(parts: Parts, rows: ir.Value, have: int, needed: int) -> ir.Value:
    return rows if have == needed else parts.builder.slice(rows, needed, 1)


def _padded(parts: Parts, rows: ir.Value, have: int, needed: int) -> ir.Value:
    return rows if have == needed else parts.builder.op("Pad", rows, parts.builder.integers(0, 0, 0, needed - have))
