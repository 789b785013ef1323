"""How a tensor *will be* stored: an encoding's settings, and its exact parts and bytes from the shape alone.

No torch: a plan is made from headers. For the same matrix a spec names the very parts that the encoding of
`compressor.core.encoding` will have, in name, type and shape.

    DenseSpec      the values, in float32 or float16 (or what the source has, for integers)
    AffineSpec     ŵ = scale · (code − zero)
    CodebookSpec   ŵ = scale · table[codebook of row, code]
    BinarySpec     ŵ = scale · (±1)
    SparseSpec     a mask, and of another spec only the codes that it keeps
    RefinedSpec    a grid for all rows, and a second one for what it leaves of some of them
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor.ops.widths import n_groups, packed_columns, plane_widths, rows_before, zero_bits, zero_steps

Group = int | Literal["row"]
Parts = dict[str, tuple[str, tuple[int, ...]]]
"""Part name -> (safetensors type, shape)."""

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
ZEROS = {"middle": lambda bits: float(2 ** (bits - 1)), "half": lambda bits: 2 ** (bits - 1) - 0.5}


class Spec(BaseModel, ABC):
    """The base; `rows` are outputs, `columns` inputs. `kind` is that of the encoding."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]

    @abstractmethod
    def parts(self, rows: int, columns: int) -> Parts:
        """The packed arrays that the encoding of a matrix (rows, columns) has."""

    @abstractmethod
    def describe(self, rows: int, columns: int) -> dict[str, Any]:
        """What `core.encoding.describe` says of the encoding of a matrix (rows, columns)."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A few words for tables."""

    @property
    @abstractmethod
    def code_bits(self) -> float:
        """Bits of a code, per weight: what widths are told apart by, scales and tables not counted."""

    @property
    def learns(self) -> bool:
        """Whether gradient steps can improve the encoding; what cannot is refused where a recipe asks for some."""
        return False

    def indivisible(self, whole: int, columns: int) -> str:
        """Why the first columns of a matrix of so many as the `whole` has are no encoding of their own; as the
        encoding's."""
        return f"stored as {self.kind}, of which a part cannot be read alone"

    def nbytes(self, rows: int, columns: int) -> int:
        """The bytes of all parts for a matrix (rows, columns)."""
        return sum(ITEM_SIZE[dtype] * math.prod(shape) for dtype, shape in self.parts(rows, columns).values())


def code_parts(name: str, rows: int, n_codes: int, bits: int) -> Parts:
    """Codes (rows, n_codes) of `bits` bits, packed row by row, in planes where the width is no power of two.

    `name` is the part's, of planes followed by their number.
    """
    widths = plane_widths(bits)
    names = [name] if len(widths) == 1 else [f"{name}.{i}" for i in range(len(widths))]
    packed = [(rows, packed_columns(n_codes, width)) for width in widths]
    return {name: ("U8", shape) for name, shape in zip(names, packed, strict=True)}


def scale_parts(rows: int, groups: int, bits: int) -> Parts:
    """Of `core.encoding.Scales` (rows, groups): of 16 `bits` each, or of 8 beside 16 a row."""
    if bits == 16:
        return {"scales": ("F16", (rows, groups))}
    return {"scales": ("U8", (rows, groups)), "row_scales": ("F16", (rows, 1))}


def group_columns(group: Group, columns: int, dim: int = 1) -> int:
    """Columns of a `group` in a matrix of so many `columns`; "row", or more than it has, is one group.

    That is padded to whole codewords of `dim` columns.
    """
    whole = n_groups(columns, dim) * dim
    return whole if group == "row" else min(group, whole)


def split_group(group: int, whole: int, columns: int) -> str:
    """Why the first `columns` of a `whole` matrix in groups of columns are not whole groups; empty where they are."""
    if columns == whole or (group >= whole and columns % 8 == 0) or columns % group == 0:
        return ""
    return f"{columns} of {whole} columns end within a group of {group}"


class DenseSpec(Spec):
    """The values as they are; `dtype` in safetensors' spelling."""

    kind = "dense"
    dtype: str = "F32"

    def parts(self, rows: int, columns: int) -> Parts:
        return {"weight": (self.dtype, (rows, columns))}

    def describe(self, rows: int, columns: int) -> dict[str, Any]:
        return {"kind": self.kind, "shape": [rows, columns]}

    def indivisible(self, whole: int, columns: int) -> str:
        return ""

    @property
    def label(self) -> str:
        return f"dense {self.dtype.lower()}"

    @property
    def code_bits(self) -> float:
        return 8 * ITEM_SIZE[self.dtype]


class AffineSpec(Spec):
    """A uniform grid per group.

    bits        of a code
    group       columns that share a scale, or "row"
    zero        the zero point: in the middle (2**(bits−1)), a half below it, or of each group its own: learned, a whole
                number, or fine, of 8 bits
    scale_bits  of a group's scale; of 8, a row has one of 16 beside
    """

    kind = "affine"
    bits: Annotated[int, Field(ge=1, le=8)] = 4
    group: Group = 64
    zero: Literal["middle", "half", "learned", "fine"] = "middle"
    scale_bits: Literal[8, 16] = 16

    def parts(self, rows: int, columns: int) -> Parts:
        group = group_columns(self.group, columns)
        groups = n_groups(columns, group)
        width = zero_bits(self.bits, zero_steps(self.zero, self.bits))
        zeros = {} if self.zero in ZEROS else code_parts("zeros", rows, groups, width)
        return {
            **code_parts("codes", rows, groups * group, self.bits),
            **scale_parts(rows, groups, self.scale_bits),
            **zeros,
        }

    def describe(self, rows: int, columns: int) -> dict[str, Any]:
        zero = ZEROS[self.zero](self.bits) if self.zero in ZEROS else None
        group = group_columns(self.group, columns)
        found = {"kind": self.kind, "shape": [rows, columns], "bits": self.bits, "group": group, "zero": zero}
        steps = zero_steps(self.zero, self.bits)
        return found if steps == 1 else found | {"zero_steps": steps}

    def indivisible(self, whole: int, columns: int) -> str:
        return split_group(group_columns(self.group, whole), whole, columns)

    @property
    def label(self) -> str:
        return f"affine {self.bits} bit, {group_label(self.group)}"

    @property
    def code_bits(self) -> float:
        return self.bits

    @property
    def learns(self) -> bool:
        return True


class CodebookSpec(Spec):
    """Learned codewords: a code of `width` bits for `dim` neighbouring weights; rows share `codebooks` tables.

    group       columns that share a scale, or "row"
    scale_bits  of a group's scale; of 8, a row has one of 16 beside
    grid        of codewords: int4, whole numbers −8 … 7; free, any in float16
    reorder     whether rows are stored in the order of their tables
    window      bits of a state, where a codeword is named by the codes of several rows, a trellis; else None
    """

    kind = "codebook"
    width: Annotated[int, Field(ge=1, le=16)] = 8
    dim: Literal[1, 2, 4, 8] = 1
    codebooks: Annotated[int, Field(ge=1)] = 1
    group: Group = 64
    scale_bits: Literal[8, 16] = 16
    grid: Literal["int4", "free"] = "int4"
    reorder: bool = False
    window: Annotated[int, Field(ge=2, le=16)] | None = None

    def n_codebooks(self, rows: int) -> int:
        """Tables of a matrix with so many `rows`: never more than these."""
        return min(self.codebooks, rows)

    def parts(self, rows: int, columns: int) -> Parts:
        group = group_columns(self.group, columns, self.dim)
        groups, width = n_groups(columns, group), self.width
        books, entries = self.n_codebooks(rows), 2 ** (self.window or width)
        parts = {
            **code_parts("codes", rows + rows_before(width, self.window), groups * group // self.dim, width),
            **scale_parts(rows, groups, self.scale_bits),
            "table": ("F16", (books, entries, self.dim)),
        }
        if self.grid == "int4":
            parts["table"] = ("U8", (books, packed_columns(entries * self.dim, 4)))
        if self.reorder:
            parts["order"] = ("U16" if rows <= 65536 else "I32", (rows,))
        return parts

    def describe(self, rows: int, columns: int) -> dict[str, Any]:
        # How many rows each codebook gets is learned; an even split stands in for it.
        books = self.n_codebooks(rows)
        counts = [rows // books + (i < rows % books) for i in range(books)]
        return {
            "kind": self.kind, "shape": [rows, columns], "width": self.width, "dim": self.dim,
            "group": group_columns(self.group, columns, self.dim), "counts": counts, "grid": self.grid,
        } | ({} if self.window is None else {"window": self.window})  # fmt: skip

    @property
    def label(self) -> str:
        if self.window is not None:
            return f"trellis {self.width / self.dim:g} bit, window {self.window}, {group_label(self.group)}"
        books = "" if self.codebooks == 1 else f"{self.codebooks} × "
        return f"codebook {self.width / self.dim:g} bit, {books}dim {self.dim}, {group_label(self.group)}"

    @property
    def code_bits(self) -> float:
        return self.width / self.dim

    @property
    def learns(self) -> bool:
        return True


class BinarySpec(Spec):
    """One bit per weight; `scale` is one per row, or one for all (tensor)."""

    kind = "binary"
    scale: Literal["row", "tensor"] = "row"

    def parts(self, rows: int, columns: int) -> Parts:
        scales = ("F16", (rows if self.scale == "row" else 1, 1))
        return {"codes": ("U8", (rows, packed_columns(columns, 1))), "scales": scales}

    def describe(self, rows: int, columns: int) -> dict[str, Any]:
        return {"kind": self.kind, "shape": [rows, columns]}

    @property
    def label(self) -> str:
        return "binary"

    @property
    def code_bits(self) -> float:
        return 1

    @property
    def learns(self) -> bool:
        return True


class SparseSpec(Spec):
    """A bit per weight for what is not zero, and the inner encoding's codes of these `kept` weights only."""

    kind = "sparse"
    inner: DenseSpec | AffineSpec | CodebookSpec
    kept: int

    def parts(self, rows: int, columns: int) -> Parts:
        inner = self.inner
        parts: Parts = {"mask": ("U8", (rows, packed_columns(columns, 1)))}
        if isinstance(inner, DenseSpec):
            return parts | {"weight": (inner.dtype, (1, self.kept))}
        others = {name: part for name, part in inner.parts(rows, columns).items() if not name.startswith("codes")}
        bits = inner.bits if isinstance(inner, AffineSpec) else inner.width
        return parts | others | code_parts("codes", 1, self.kept, bits)

    def describe(self, rows: int, columns: int) -> dict[str, Any]:
        return {"kind": self.kind, "shape": [rows, columns], "inner": self.inner.describe(rows, columns)}

    @property
    def label(self) -> str:
        return f"mask, {self.inner.label}"

    @property
    def code_bits(self) -> float:
        return self.inner.code_bits

    @property
    def learns(self) -> bool:
        return self.inner.learns


class RefinedSpec(Spec):
    """`inner` for all rows, and `extra` for what it leaves of `n` of them."""

    kind = "refined"
    inner: AffineSpec
    extra: AffineSpec
    n: int

    def parts(self, rows: int, columns: int) -> Parts:
        halves = (("inner", self.inner.parts(rows, columns)), ("extra", self.extra.parts(self.n, columns)))
        parts = {f"{name}.{part}": stored for name, half in halves for part, stored in half.items()}
        return parts | {"rows": ("I32", (self.n,))}

    def describe(self, rows: int, columns: int) -> dict[str, Any]:
        return {
            "kind": self.kind, "shape": [rows, columns],
            "inner": self.inner.describe(rows, columns), "extra": self.extra.describe(self.n, columns),
        }  # fmt: skip

    @property
    def label(self) -> str:
        return f"{self.inner.label}; {self.n:,} rows + {self.extra.bits} bit"

    @property
    def code_bits(self) -> float:
        return self.inner.code_bits

    @property
    def learns(self) -> bool:
        return True


def sparse_spec(spec: Spec, rows: int, columns: int, kept: int) -> Spec:
    """The smaller of `spec` and its sparse form, for a matrix of which `kept` weights are not zero."""
    if isinstance(spec, CodebookSpec) and (spec.dim > 1 or spec.reorder or spec.window is not None):
        return spec
    if not isinstance(spec, (DenseSpec, AffineSpec, CodebookSpec)):
        return spec
    sparse = SparseSpec(inner=spec, kept=kept)
    return sparse if sparse.nbytes(rows, columns) < spec.nbytes(rows, columns) else spec


def group_label(group: Group) -> str:
    """For tables."""
    return "per row" if group == "row" else f"group {group}"
