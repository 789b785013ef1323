"""Operands of `MatMulNBits` from stored parts: through nodes that onnxruntime folds at load, or directly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.export.decoding import unpacked
from compressor.export.forms import Form, stored_codes
from compressor.export.pairs import nibbles_in_pairs, planes_in_pairs
from compressor.export.parts import Parts, digits
from compressor.export.units import Unit
from compressor.ops.widths import packed_columns, plane_widths

UINT8 = ir.DataType.UINT8


def byte_table(width: int, values: tuple[int, ...], kernel_bits: int) -> np.ndarray:
    """What each byte of codes becomes: uint8 (256, bytes of 8 / width values of `kernel_bits`)."""
    per = 8 // kernel_bits
    wide = np.array(values, np.uint8)[digits(width)].reshape(256, -1, per)
    return np.bitwise_or.reduce(wide << np.arange(0, 8, kernel_bits, dtype=np.uint8), axis=-1).astype(np.uint8)


def kernel_codes(parts: Parts, form: Form) -> ir.Value:
    """The operand B: uint8 (rows, blocks, bytes of a block), rows in the order of the matrix."""
    b = parts.builder
    blocks, block_bytes = -(-parts.columns // form.block), form.block * form.bits // 8
    n_codes, width = stored_codes(parts.description)
    stored_bytes = packed_columns(n_codes, width)
    if form.direct and stored_bytes == blocks * block_bytes:
        return parts.by_row("codes", UINT8, blocks, block_bytes)
    if form.direct:
        rows = parts.by_row("codes", UINT8, stored_bytes)
    else:
        pieces = [_looked_up(piece, form) for piece in parts.pieces()]
        rows = pieces[0] if len(pieces) == 1 else b.op("Concat", *pieces, axis=0)
        stored_bytes = packed_columns(n_codes * parts.description.get("dim", 1), form.bits)
    shaped = b.reshape(_fitted(parts, rows, stored_bytes, blocks * block_bytes), -1, blocks, block_bytes)
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
        values = tuple(range(2 ** parts.description["bits"]))
        return b.reshape(_ored_planes(parts, values, form.bits, "zeros", blocks), -1, zero_bytes)
    if blocks == parts.groups and form.bits == 4 and blocks % 2 == 0:
        stored = parts.by_row("zeros", ir.DataType.UINT16, zero_bytes)
        return b.op("Gather", nibbles_in_pairs(b, _whole(parts).astype(np.uint8)), b.cast(stored, ir.DataType.INT32))
    zeros = unpacked(parts, "zeros", parts.groups)
    if form.shifted:
        zeros = b.op("Gather", b.constant(_whole(parts).astype(np.int32)), zeros)
    spread = _per_block(parts, zeros, form)
    padded = _padded(parts, spread, blocks, packed_columns(blocks, form.bits) * 8 // form.bits)
    per = 8 // form.bits
    weights = b.constant((2 ** np.arange(0, 8, form.bits)).astype(np.int32))
    grouped = b.op("Mul", b.reshape(padded, parts.n_rows, -1, per), weights)
    return b.cast(b.op("ReduceSum", grouped, b.integers(2), keepdims=0), UINT8)


def kernel_shifts(parts: Parts) -> ir.Value:
    """What a group's inputs are multiplied by, beside the product with whole zero points: float32 (rows, groups)."""
    b = parts.builder
    between = b.constant(_whole(parts) - _points(parts))
    return b.op("Mul", parts.scales(), b.op("Gather", between, parts.plane_index("zeros", 8, parts.groups)))


def _points(parts: Parts) -> np.ndarray:
    """The zero point that each byte of fine ones says, float32 (256,)."""
    return np.arange(256, dtype=np.float32) * np.float32(1 / parts.zero_steps)


def _whole(parts: Parts) -> np.ndarray:
    """The codes nearest to them, float32 (256,)."""
    return np.minimum(np.round(_points(parts)), np.float32(2 ** parts.description["bits"] - 1))


def _looked_up(parts: Parts, form: Form) -> ir.Value:
    """Kernel bytes of the stored rows, uint8 (rows, …), in bytes of a row."""
    if parts.description["kind"] == "codebook":
        return _codewords(parts)
    assert form.values is not None
    return _ored_planes(parts, form.values, form.bits, "codes", stored_codes(parts.description)[0])


def _ored_planes(parts: Parts, values: tuple[int, ...], kernel_bits: int, stem: str, n_codes: int) -> ir.Value:
    """Each plane's bytes looked up; planes hold separate bits of the values, so OR joins them."""
    b, shift, joined = parts.builder, 0, None
    needed, planes, tables = packed_columns(n_codes, kernel_bits), parts.planes(stem), []
    for _, width in planes:
        base = values[0] if shift else 0
        tables.append(byte_table(width, tuple(values[i << shift] - base for i in range(2**width)), kernel_bits))
        shift += width
    paired = planes_in_pairs(parts, stem, n_codes, tables)
    if paired is not None:
        return paired
    for (part, width), table in zip(planes, tables, strict=True):
        rows = b.op("Gather", b.constant(table), parts.plane_index(part, width, n_codes))
        have = packed_columns(n_codes, width) * table.shape[1]
        rows = _fitted(parts, b.reshape(rows, -1, have), have, needed)
        joined = rows if joined is None else b.op("BitwiseOr", joined, rows)
    assert joined is not None
    return joined


def _codewords(parts: Parts) -> ir.Value:
    """Codewords of a table on the int4 grid, as stored (+8), for every code."""
    b, description = parts.builder, parts.description
    dim, books = description["dim"], len(description["counts"])
    n_codes, width = stored_codes(description)
    if dim == 1 and width == 3:
        planes = _ored_planes(parts, tuple(range(8)), 4, "codes", n_codes)
        index, table, entry_bytes, entries = b.cast(planes, ir.DataType.INT32), _byte_codewords(parts, 4), 1, 256
        n_index = packed_columns(n_codes, 4)
    elif width < 8 and len(plane_widths(width)) == 1:
        index, table = parts.plane_index("codes", width, n_codes), _byte_codewords(parts, width)
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
    return found if have == needed else _fitted(parts, b.reshape(found, -1, have), have, needed)


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
