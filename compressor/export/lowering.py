"""Encoded tensors as ONNX nodes: one method per consuming operator.

    lowering = Lowering(tensors, GraphBuilder(graph))
    y = lowering.matmul(x, "model.layers.0.mlp.up_proj.weight", bias)

Initialisers point into the file that `write_tensors` wrote beside the model. What `refusal` refuses
must not reach these methods. Modes: *default* aims at onnxruntime's own MatMulNBits; *compat* at versions from 1.20 on
(opset ≤ 21, int4 kernel only); *standard* uses ai.onnx alone (see standard.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compressor.core.tensors import EncodedTensors
from compressor.export.builder import GraphBuilder
from compressor.export.decoding import decoded, unpacked
from compressor.export.forms import FOLD_LIMIT, Form, Mode, coded, form, least_version, refusal
from compressor.export.kernel_operands import kernel_codes, kernel_scales, kernel_shifts, kernel_zeros
from compressor.export.parts import Parts
from compressor.export.standard import Repacked
from compressor.ops.widths import n_groups

__all__ = ["Lowering", "Mode", "form", "least_version", "refusal"]

OPSETS: dict[str, int] = {"default": 21, "compat": 21, "standard": 25}
IR_VERSIONS: dict[str, int] = {"default": 10, "compat": 10, "standard": 13}


class Lowering:
    """Lowers tensors into the graph of `builder` (settable).

    `exact` asks the kernels for float32 activations instead of int8: slow, to prove that the artifact computes what
    the encodings decode to. `directory` is where standard mode writes `<graph>.repacked.bin`.
    """

    def __init__(
        self, tensors: EncodedTensors, builder: GraphBuilder,
        mode: Mode = "default", exact: bool = False, directory: Path | None = None, graph: str = "model",
    ) -> None:  # fmt: skip
        self.tensors, self.builder = tensors, builder
        self.mode: Mode = mode
        self._exact = exact
        self._operands: dict[str, tuple[ir.Value, ir.Value, ir.Value | None]] = {}
        self._sums: dict[tuple[int, int, int], tuple[ir.Value, ir.Value]] = {}
        self._indicators: dict[tuple[int, int], ir.Value] = {}
        self._repacked = Repacked(directory, graph) if mode == "standard" and directory else None

    def matmul(
        self, x: ir.Value, name: str, bias: ir.Value | None = None, *, transpose: bool = True, output: str | None = None
    ) -> ir.Value:
        """x @ T.T + bias for the tensor T of this name; x @ T where not `transpose` (GPT-2's Conv1D)."""
        description = self.tensors.describe(name)
        if description["kind"] == "refined":
            return self._refined_matmul(x, name, bias, output)
        chosen = form(description, self.mode)
        outputs_first = transpose != description["transposed"]
        named = None if bias is not None else output
        if chosen is None:
            product = self._float_matmul(x, name, outputs_first, named)
        elif not outputs_first:
            product = self.builder.op("MatMul", x, decoded(self._parts(name)), name=named)
        elif self.mode == "standard":
            product = self._standard_matmul(x, name, chosen, named)
        else:
            product = self._kernel_matmul(x, name, chosen, named)
        return product if bias is None else self.builder.op("Add", product, bias, name=output)

    def joins(self, names: Sequence[str]) -> bool:
        """Whether `joined_matmul` can make one product of these tensors: alike in form, and in onnxruntime's kernel."""
        forms = {form(self.tensors.describe(name), self.mode) for name in names}
        descriptions = [self.tensors.describe(name) for name in names]
        zeros = {"zero" in description and description["zero"] is None for description in descriptions}
        layouts = {(description["transposed"], description["shape"][1]) for description in descriptions}
        return self.mode != "standard" and None not in forms and len(forms) == len(zeros) == len(layouts) == 1

    def joined_matmul(self, x: ir.Value, names: Sequence[str]) -> ir.Value:
        """The products of x with several tensors side by side: their operands are joined at load."""
        b, descriptions = self.builder, [self.tensors.describe(name) for name in names]
        chosen = form(descriptions[0], self.mode)
        assert chosen is not None
        operands = zip(*(self._kernel_operands(name, chosen) for name in names), strict=True)
        joined = [None if part[0] is None else b.stacked(part) for part in operands]
        rows, columns = sum(description["shape"][0] for description in descriptions), descriptions[0]["shape"][1]
        if not chosen.shifted:
            return self._kernel_product(x, joined, rows, columns, chosen, None)
        shifts = b.stacked([kernel_shifts(self._parts(name)) for name in names])
        product = self._kernel_product(x, joined, rows, columns, chosen, None)
        return self._shifted(product, x, shifts, columns, descriptions[0]["group"], None)

    def embedding(self, ids: ir.Value, name: str, tied: bool = False) -> ir.Value:
        """Rows of the tensor for integer `ids` of any shape: float32 (…, columns).

        `tied`: the same tensor is also an operand of `matmul`, so that its folded operand can serve both.
        """
        if self.tensors.describe(name)["kind"] == "refined":
            return self._refined_embedding(ids, name, tied)
        chosen = form(self.tensors.describe(name), self.mode)
        if self.mode == "default" and chosen is not None and (chosen.direct or tied) and not chosen.shifted:
            return self._block_embedding(ids, name, chosen)
        b, columns = self.builder, self.tensors.describe(name)["shape"][1]
        rows = decoded(self._parts(name), rows=b.reshape(ids, -1))
        shape = b.op("Concat", b.op("Shape", ids), b.integers(columns), axis=0)
        return b.op("Reshape", rows, shape)

    def constant(self, name: str) -> ir.Value:
        """The tensor itself, float32, through nodes that fold at load."""
        parts = self._parts(name)
        shape = tuple(parts.description["tensor_shape"])
        if parts.description["kind"] == "refined":
            inner, extra, rows = self._halves(name)
            at = self.builder.op("Unsqueeze", rows, self.builder.integers(1))
            matrix = self.builder.op("ScatterND", self.constant(inner), at, self.constant(extra), reduction="add")
            return matrix if shape == (parts.n_rows, parts.columns) else self.builder.reshape(matrix, *shape)
        half = parts.nbytes("weight") == 2 * math.prod(shape) if parts.has("weight") else False
        if parts.description["kind"] == "dense" and not parts.description["transposed"]:
            stored = parts.values(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT, *shape)
            return self.builder.cast(stored, ir.DataType.FLOAT) if half else stored
        matrix = decoded(parts)
        if parts.description["transposed"]:
            matrix = self.builder.op("Transpose", matrix, perm=[1, 0])
        return matrix if shape == (parts.n_rows, parts.columns) else self.builder.reshape(matrix, *shape)

    def int8_codes(self, name: str) -> ir.Value:
        """What the scales multiply, of a tensor whose kind is `is_int8`: int8 in its shape, folded at load."""
        b, parts = self.builder, self._parts(name)
        levels = coded(parts.description).levels(parts.description)
        assert levels is not None
        codes = scaled = unpacked(parts, "codes", parts.columns)
        for _ in range(round(levels[1] - levels[0]) - 1):
            scaled = b.op("Add", scaled, codes)
        centred = b.op("Sub", scaled, b.constant(np.array(-levels[0], np.int32)))
        return b.reshape(b.cast(centred, ir.DataType.INT8), *parts.description["tensor_shape"])

    def close(self) -> int:
        """Ends writing; the bytes that standard mode added beside the stored parts."""
        return self._repacked.close() if self._repacked else 0

    def _parts(self, name: str) -> Parts:
        return Parts(self.builder, self.tensors, name)

    def _float_matmul(self, x: ir.Value, name: str, outputs_first: bool, output: str | None) -> ir.Value:
        b, parts = self.builder, self._parts(name)
        half = parts.nbytes("weight") == 2 * parts.n_rows * parts.columns
        pieces = -(-4 * parts.n_rows * parts.columns // FOLD_LIMIT) if half or self.mode == "standard" else 1
        if not outputs_first or pieces == 1:
            return self._dense_product(x, decoded(parts), outputs_first, output)
        step = -(-parts.n_rows // pieces)
        dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        products = []
        for start in range(0, parts.n_rows, step):
            piece = parts.piece(start, min(start + step, parts.n_rows))
            rows = piece.by_row("weight", dtype, parts.columns)
            products.append(self._dense_product(x, b.cast(rows, ir.DataType.FLOAT) if half else rows, True, None))
        return b.op("Concat", *products, axis=-1, name=output)

    def _dense_product(self, x: ir.Value, matrix: ir.Value, outputs_first: bool, output: str | None) -> ir.Value:
        b = self.builder
        if not outputs_first:
            return b.op("MatMul", x, matrix, name=output)
        if self.mode == "standard":
            return b.op("MatMul", x, b.op("Transpose", matrix, perm=[1, 0]), name=output)
        return b.contributed("FusedMatMul", x, matrix, transA=0, transB=1, alpha=1.0, name=output)

    def _kernel_operands(self, name: str, chosen: Form) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        name = self.tensors.tied.get(name, name)
        if name not in self._operands:
            parts = self._parts(name)
            self._operands[name] = (
                kernel_codes(parts, chosen), kernel_scales(parts, chosen), kernel_zeros(parts, chosen))  # fmt: skip
        return self._operands[name]

    def _kernel_matmul(self, x: ir.Value, name: str, chosen: Form, output: str | None) -> ir.Value:
        (rows, columns), operands = self.tensors.describe(name)["shape"], self._kernel_operands(name, chosen)
        if not chosen.shifted:
            return self._kernel_product(x, operands, rows, columns, chosen, output)
        product, parts = self._kernel_product(x, operands, rows, columns, chosen, None), self._parts(name)
        return self._shifted(product, x, kernel_shifts(parts), columns, parts.group, output)

    def _shifted(
        self, product: ir.Value, x: ir.Value, shifts: ir.Value, columns: int, group: int, output: str | None
    ) -> ir.Value:  # fmt: skip
        """product + (sums of x over groups of columns) @ shiftsᵀ; an input of several products is summed once."""
        b, key = self.builder, (id(x), columns, group)
        if key not in self._sums:
            self._sums[key] = x, b.op("MatMul", x, self._indicator(columns, group))
        moved = b.contributed("FusedMatMul", self._sums[key][1], shifts, transA=0, transB=1, alpha=1.0)
        return b.op("Add", product, moved, name=output)

    def _indicator(self, columns: int, group: int) -> ir.Value:
        """float32 (columns, groups), 1 where a column is in a group; in nodes, which are smaller than it is."""
        if (columns, group) not in self._indicators:
            b = self.builder
            first, last, one = (b.constant(np.array(n, np.int64)) for n in (0, columns, 1))
            at = b.op("Div", b.op("Range", first, last, one), b.constant(np.array(group, np.int64)))
            groups = b.op("Range", first, b.constant(np.array(n_groups(columns, group), np.int64)), one)
            member = b.op("Equal", b.op("Unsqueeze", at, b.integers(1)), b.op("Unsqueeze", groups, b.integers(0)))
            self._indicators[columns, group] = b.cast(member, ir.DataType.FLOAT)
        return self._indicators[columns, group]

    def _kernel_product(
        self, x: ir.Value, operands: Sequence[ir.Value | None], rows: int, columns: int, chosen: Form,
        output: str | None,
    ) -> ir.Value:  # fmt: skip
        return self.builder.contributed(
            "MatMulNBits", x, *operands, K=columns, N=rows, bits=chosen.bits, block_size=chosen.block,
            accuracy_level=1 if self._exact else 4, name=output,
        )  # fmt: skip

    def _block_embedding(self, ids: ir.Value, name: str, chosen: Form) -> ir.Value:
        b, parts = self.builder, self._parts(self.tensors.tied.get(name, name))
        rows, columns = parts.description["shape"]
        codes, scales, zeros = self._kernel_operands(name, chosen)
        blocks = -(-columns // chosen.block)
        row_bytes = blocks * chosen.block * chosen.bits // 8
        as_stored = chosen.direct and not parts.has("order") and parts.nbytes("codes") == rows * row_bytes
        if as_stored:  # a row as it lies: nothing is made for the table that the product does not have as well
            codes = parts.by_row("codes", ir.DataType.UINT8, row_bytes)
        inputs = [codes, ids, scales if as_stored else b.reshape(scales, rows, blocks, 1)]
        if zeros is not None:
            inputs.append(zeros if as_stored else self._block_zeros(name, chosen, zeros, rows, blocks))
        found = b.contributed(
            "GatherBlockQuantized", *inputs, bits=chosen.bits, block_size=chosen.block, gather_axis=0,
            quantize_axis=1 if as_stored else 2,
        )  # fmt: skip
        if not as_stored and ids.shape is not None:
            found = b.reshape(found, *[0] * len(ids.shape), -1)
        elif not as_stored:
            found = b.op("Reshape", found, b.op("Concat", b.op("Shape", ids), b.integers(-1), axis=0))
        return found if columns == blocks * chosen.block else b.slice(found, columns, -1)

    def _block_zeros(self, name: str, chosen: Form, zeros: ir.Value, rows: int, blocks: int) -> ir.Value:
        """Packed zero points along blocks, one byte each: GatherBlockQuantized packs along the quantised axis."""
        b, per = self.builder, 8 // chosen.bits
        if per == 1:
            return b.reshape(zeros, rows, blocks, 1)
        mask = 2**chosen.bits - 1
        table = np.stack([np.arange(256) >> i * chosen.bits & mask for i in range(per)], axis=1).astype(np.uint8)
        spread = b.op("Gather", b.constant(table), b.cast(zeros, ir.DataType.INT32))
        padded = -(-blocks // per) * per
        return b.op("Unsqueeze", b.slice(b.reshape(spread, rows, padded), blocks, 1), b.integers(2))

    def _halves(self, name: str) -> tuple[str, str, ir.Value]:
        """The names of a refined table's halves, and the rows (n,) int64 that the second one refines."""
        name, parts = self.tensors.tied.get(name, name), self._parts(name)
        n = parts.description["extra"]["shape"][0]
        rows = self.builder.cast(parts.whole("rows", ir.DataType.INT32, n), ir.DataType.INT64)
        return f"{name}.inner", f"{name}.extra", rows

    def _refined_matmul(self, x: ir.Value, name: str, bias: ir.Value | None, output: str | None) -> ir.Value:
        b = self.builder
        inner, extra, rows = self._halves(name)
        product, left = self.matmul(x, inner, bias), self.matmul(x, extra)
        where = b.op("Expand", rows, b.op("Shape", left))
        return b.op("ScatterElements", product, where, left, axis=-1, reduction="add", name=output)

    def _refined_embedding(self, ids: ir.Value, name: str, tied: bool) -> ir.Value:
        """Every id looks into the second table too: at its place there, or at the first one for nothing."""
        b = self.builder
        inner, extra, rows = self._halves(name)
        n, n_rows = self.tensors.describe(extra)["shape"][0], self.tensors.describe(inner)["shape"][0]
        last, one = b.constant(np.array(n, np.int64)), b.constant(np.array(1, np.int64))
        order = b.op("Range", b.constant(np.array(0, np.int64)), last, one)
        places = b.op("ScatterElements", b.op("Expand", last, b.integers(n_rows)), rows, order, axis=0)
        at = b.op("Gather", places, ids)
        known = b.op("Less", at, last)
        found = self.embedding(b.op("Mul", at, b.cast(known, ir.DataType.INT64)), extra, tied)
        share = b.op("Unsqueeze", b.cast(known, ir.DataType.FLOAT), b.integers(-1))
        return b.op("Add", self.embedding(ids, inner, tied), b.op("Mul", found, share))

    def _standard_matmul(self, x: ir.Value, name: str, chosen: Form, output: str | None) -> ir.Value:
        if self._repacked is None:
            raise AssertionError("standard mode needs the artifact's directory")
        weight = self._repacked.dequantized(self.builder, self.tensors, name, chosen)
        return self.builder.op("MatMul", x, weight, name=output)
