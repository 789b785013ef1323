"""Encodings: how one matrix is stored.

An encoding is of a matrix (rows = outputs, columns = inputs). It can `decode()` to float32, name its packed `parts()`
and count its `nbytes`; it knows nothing of files, graphs or papers. `Layout` says how the matrix becomes the tensor
of the network again. The arrays in `parts()` are what the artifact stores, byte for byte.

    Dense      the values, in float32 or float16
    Scaled     ŵ = scale · level of a code, in groups of columns
      Affine     scale · (code − zero)               2, 3, 4, 8 bits
      Binary     scale · (±1)                        one group
    Codebook   ŵ = scale · table[codebook of row, code]   a code stands for `dim` neighbouring columns; with a window
               the last bits of the codes down a column do, a trellis
    Sparse     a mask, and codes or values only where it is set
    Refined    a grid for all rows, and a second one for what it leaves of some of them
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor.core.errors import CheckpointError
from compressor.core.spec import split_group
from compressor.ops.packing import pack, pack_plane, unpack, unpack_plane
from compressor.ops.states import states_of
from compressor.ops.widths import n_groups, plane_widths, zero_bits

_ROWS = 4096
"""Decoded at a time."""


@dataclass(frozen=True)
class Layout:
    """How a matrix (rows, columns) restores a tensor: transpose if `transposed`, then reshape to `shape`."""

    shape: tuple[int, ...]
    transposed: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """The matrix (rows, columns) of a `tensor` of this `shape`."""
        flat = tensor.reshape(tensor.shape[0], -1)
        return flat.T if self.transposed else flat

    def tensor(self, matrix: Tensor) -> Tensor:
        """The tensor that a `matrix` (rows, columns) restores."""
        return (matrix.T if self.transposed else matrix).reshape(self.shape)


@dataclass(frozen=True)
class Encoding(ABC):
    """The base: `shape` is (rows, columns); `kind` is its name in files."""

    kind: ClassVar[str]
    shape: tuple[int, int]

    @abstractmethod
    def decode(self) -> Tensor:
        """The matrix, float32 (rows, columns)."""

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The matrix, float32, a few rows at a time: which they are, and what is in them, to be read."""
        matrix = self.decode()
        for start in range(0, len(matrix), _ROWS):
            rows = slice(start, start + _ROWS)
            yield rows, matrix[rows]

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The packed arrays by name; what an artifact stores."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What besides the parts and the shape rebuilds the encoding; plain JSON values."""

    @classmethod
    @abstractmethod
    def rebuild(cls, shape: tuple[int, int], settings: dict[str, Any], parts: dict[str, Tensor]) -> Encoding:
        """The inverse of `parts()` and `settings()`, for a matrix of this `shape`."""

    def indivisible(self, rows: int, columns: int) -> str:
        """Why its first rows and columns are no encoding of their own; empty where they are."""
        return f"stored as {self.kind}, of which a part cannot be read alone"

    def beginning(self, rows: int, columns: int) -> Encoding:
        """The encoding of its first rows and columns: the same codes.

        Raises:
            NotImplementedError: They are none of their own; `indivisible` says why.
        """
        raise NotImplementedError(self.indivisible(rows, columns))

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def bits_per_weight(self) -> float:
        """All bytes over all weights, scales and tables counted."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class Dense(Encoding):
    """The values as they are, in the dtype of `values` (float32 or float16)."""

    kind = "dense"
    values: Tensor

    def decode(self) -> Tensor:
        return self.values.float()

    def parts(self) -> dict[str, Tensor]:
        return {"weight": self.values.contiguous()}

    def indivisible(self, rows: int, columns: int) -> str:
        return ""

    def beginning(self, rows: int, columns: int) -> Dense:
        return Dense((rows, columns), self.values[:rows, :columns].contiguous())

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(cls, shape, settings, parts):
        return cls(shape, parts["weight"])


@dataclass(frozen=True)
class Scales:
    """Group scales, s (rows, n_groups): float16, or a byte per group times a float16 per row.

    `row` is (rows, 1) float16 when `values` is uint8: s = row · values / 255; None when `values` are the scales.
    """

    values: Tensor
    row: Tensor | None = None

    @classmethod
    def of(cls, scales: Tensor, bits: int = 16) -> Scales:
        """Rounds float `scales` (rows, n_groups) to what is stored, in 8 or 16 `bits` each.

        Raises:
            ValueError: A scale of 8 bits is negative.
            CheckpointError: A scale is beyond float16, as of weights beyond half a million.
        """
        if bool((scales.abs() > torch.finfo(torch.float16).max).any()):
            raise CheckpointError(
                f"its weights are too large to be encoded; they take a scale of {float(scales.abs().max()):.3g}, "
                "beyond float16, in which scales are stored; leave it as it is, with `select` of others"
            )
        if bits == 16:
            return cls(scales.half())
        if bool((scales < 0).any()):
            raise ValueError("scales of 8 bits cannot be negative")
        row = scales.amax(dim=1, keepdim=True).half()
        share = scales / row.float().clamp_min(torch.finfo(torch.float32).tiny)
        return cls((255 * share).round().clamp(0, 255).to(torch.uint8), row)

    def decode(self) -> Tensor:
        """The scales, float32 (rows, n_groups)."""
        if self.row is None:
            return self.values.float()
        return self.values.float() * (self.row.float() / 255)

    def parts(self) -> dict[str, Tensor]:
        """The stored arrays by name."""
        return {"scales": self.values} if self.row is None else {"scales": self.values, "row_scales": self.row}

    @classmethod
    def rebuild(cls, parts: dict[str, Tensor]) -> Scales:
        """The inverse of `parts()`."""
        return cls(parts["scales"], parts.get("row_scales"))


def _plane_parts(codes: Tensor, bits: int) -> dict[str, Tensor]:
    planes = pack(codes, bits)
    if len(planes) == 1:
        return {"codes": planes[0]}
    return {f"codes.{i}": plane for i, plane in enumerate(planes)}


def _planes(parts: dict[str, Tensor], bits: int) -> list[Tensor]:
    if len(plane_widths(bits)) == 1:
        return [parts["codes"]]
    return [parts[f"codes.{i}"] for i in range(len(plane_widths(bits)))]


@dataclass(frozen=True)
class Scaled(Encoding):
    """A code for every weight, and a scale for each group of columns: ŵ = s·level(q).

    group    columns that share a scale
    codes    (rows, n_groups·group) int, where padding columns may hold any
    scales   (rows, n_groups), or one row for all

    Gradient steps learn the scales of any such encoding.
    """

    group: int
    codes: Tensor
    scales: Scales

    @abstractmethod
    def levels(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """What the scales multiply: a new float32 tensor (rows, n_groups, group), of these `rows`."""

    def decode(self) -> Tensor:
        matrix = torch.empty(self.shape, device=self.codes.device)
        for rows, piece in self.pieces():  # tables have many rows, and each step copies them
            matrix[rows] = piece
        return matrix

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        scales = self.scales.decode().unsqueeze(-1).expand(self.shape[0], -1, -1)
        for start in range(0, self.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            yield rows, self._of_rows(rows, scales)

    def of_rows(self, rows: Tensor) -> Tensor:
        """What `decode` has in these rows."""
        return self._of_rows(rows, self.scales.decode().unsqueeze(-1).expand(self.shape[0], -1, -1))

    def _of_rows(self, rows: slice | Tensor, scales: Tensor) -> Tensor:
        return self.levels(rows).mul_(scales[rows]).flatten(1)[:, : self.shape[1]]


@dataclass(frozen=True)
class Affine(Scaled):
    """A uniform grid per group of columns: ŵ = s·(q − z), q in 0 … 2**bits − 1 (Jacob et al., arXiv 1712.05877).

    Padding columns hold the code nearest zero. `zero` is a float (the same for all groups: 2**(bits−1), or that minus
    a half for levels ±½, ±1½, …) or a tensor (rows, n_groups) of multiples of 1/`zero_steps`: whole numbers, or in
    finer steps, of 8 bits.
    """

    kind = "affine"
    bits: int
    zero: float | Tensor
    zero_steps: int = 1

    def levels(self, rows: slice | Tensor = slice(None)) -> Tensor:
        zero = self.zero[rows].float().unsqueeze(-1) if isinstance(self.zero, Tensor) else self.zero
        codes = self.codes[rows]
        return codes.view(len(codes), -1, self.group).float().sub_(zero)

    @property
    def code_bits(self) -> int:
        """Of a code."""
        return self.bits

    def indivisible(self, rows: int, columns: int) -> str:
        return split_group(self.group, self.shape[1], columns)

    def beginning(self, rows: int, columns: int) -> Affine:
        group = min(self.group, columns) if self.group >= self.shape[1] else self.group
        n = n_groups(columns, group)
        scales = Scales(self.scales.values, self.scales.row)
        if self.scales.values.shape != (1, 1) or rows == 1:
            row = None if self.scales.row is None else self.scales.row[:rows].contiguous()
            scales = Scales(self.scales.values[:rows, :n].contiguous(), row)
        zero = self.zero[:rows, :n].contiguous() if isinstance(self.zero, Tensor) else self.zero
        codes = self.codes[:rows, : n * group].contiguous()
        return Affine((rows, columns), group, codes, scales, self.bits, zero, self.zero_steps)

    def zero_codes(self) -> Tensor:
        """The code of zero everywhere, like `codes`; zero points are whole."""
        if not isinstance(self.zero, Tensor):
            return torch.full_like(self.codes, int(self.zero))
        return self.zero.to(self.codes.dtype).repeat_interleave(self.group, 1)

    def parts(self) -> dict[str, Tensor]:
        parts = {**_plane_parts(self.codes, self.bits), **self.scales.parts()}
        if isinstance(self.zero, Tensor):
            zeros = _plane_parts((self.zero * self.zero_steps).int(), zero_bits(self.bits, self.zero_steps))
            parts |= {f"zeros{name[5:]}": part for name, part in zeros.items()}
        return parts

    def settings(self) -> dict[str, Any]:
        zero = None if isinstance(self.zero, Tensor) else self.zero
        found = {"bits": self.bits, "group": self.group, "zero": zero}
        return found if self.zero_steps == 1 else found | {"zero_steps": self.zero_steps}

    @classmethod
    def rebuild(cls, shape, settings, parts):
        bits, group, zero = settings["bits"], settings["group"], settings["zero"]
        groups, steps = n_groups(shape[1], group), settings.get("zero_steps", 1)
        if zero is None:
            zeros = {f"codes{name[5:]}": part for name, part in parts.items() if name.startswith("zeros")}
            width = zero_bits(bits, steps)
            zero = unpack(_planes(zeros, width), width, groups).int()
            zero = zero if steps == 1 else zero / steps
        codes = unpack(_planes(parts, bits), bits, groups * group)
        return cls(shape, group, codes, Scales.rebuild(parts), bits, zero, steps)


@dataclass(frozen=True)
class Codebook(Encoding):
    """Learned codewords: a code of `width` bits names `dim` neighbouring columns: width / dim bits a weight.

    table   (n_codebooks, 2**width, dim): int8 on the int4 grid −8 … 7, or float16 (free)
    codes   (rows, n_groups·group / dim) int, rows in *stored* order
    window  None; or the bits of a state: a row's code lowest, then those of the rows before it. The table has 2**window
            codewords then, the only one, and codes as many rows more, first, as a state reaches back
    scales  (rows, n_groups), rows in stored order
    counts  rows per codebook: the first counts[0] stored rows use codebook 0, and so on
    order   (rows,) stored row i is row order[i] of the matrix; None where rows keep their order
    """

    kind = "codebook"
    width: int
    dim: int
    group: int
    codes: Tensor
    table: Tensor
    scales: Scales
    counts: tuple[int, ...]
    order: Tensor | None = None
    window: int | None = None

    def index(self) -> Tensor:
        """The codeword of each row's vectors, int32 (rows, n_groups·group / dim), in the tables one after another."""
        if self.window is not None:
            return states_of(self.codes, self.width, self.window)
        book = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts)).to(self.codes.device)
        return (self.codes + (book * self.table.shape[1]).int().unsqueeze(1)).int()

    def stored(self) -> Tensor:
        """The matrix with its rows in stored order, float32."""
        rows, columns = self.shape
        values = self.table.float().flatten(0, 1)[self.index().flatten()].view(rows, -1, self.group)
        return (values * self.scales.decode().unsqueeze(-1)).flatten(1)[:, :columns]

    def decode(self) -> Tensor:
        stored = self.stored()
        if self.order is None:
            return stored
        matrix = torch.empty_like(stored)
        matrix[self.order.long()] = stored
        return matrix

    @property
    def on_int4_grid(self) -> bool:
        """Whether codewords are whole numbers −8 … 7, as the int4 kernel takes them."""
        return self.table.dtype == torch.int8

    @property
    def code_bits(self) -> int:
        """Of a code."""
        return self.width

    def zero_codes(self) -> Tensor:
        """The code of the zero codeword everywhere, like `codes`; codewords of one weight, rows in their own order."""
        word = (self.table[..., 0] == 0).int().argmax(1).to(self.codes.dtype)
        rows = torch.repeat_interleave(word, torch.tensor(self.counts, device=word.device))
        return rows.unsqueeze(1).expand_as(self.codes).clone()

    def parts(self) -> dict[str, Tensor]:
        table = self.table
        if self.on_int4_grid:
            table = pack_plane(table.flatten(1).to(torch.int32) + 8, 4)
        parts = {**_plane_parts(self.codes, self.width), **self.scales.parts(), "table": table}
        if self.order is not None:
            parts["order"] = self.order.to(torch.uint16 if self.shape[0] <= 65536 else torch.int32)
        return parts

    def settings(self) -> dict[str, Any]:
        found = {
            "width": self.width, "dim": self.dim, "group": self.group,
            "counts": list(self.counts), "grid": "int4" if self.on_int4_grid else "free",
        }  # fmt: skip
        return found if self.window is None else found | {"window": self.window}

    @classmethod
    def rebuild(cls, shape, settings, parts):
        width, dim, group = settings["width"], settings["dim"], settings["group"]
        counts, window = tuple(settings["counts"]), settings.get("window")
        table, entries = parts["table"], 2 ** (window or width)
        if settings["grid"] == "int4":
            table = (unpack_plane(table, 4, entries * dim).to(torch.int8) - 8).view(len(counts), entries, dim)
        codes = unpack(_planes(parts, width), width, n_groups(shape[1], group) * group // dim)
        return cls(shape, width, dim, group, codes, table, Scales.rebuild(parts), counts, parts.get("order"), window)


@dataclass(frozen=True)
class Binary(Scaled):
    """One bit per weight: ŵ = s·(+1 where the bit is set, else −1), in one group; scales (rows, 1) or (1, 1)."""

    kind = "binary"

    @classmethod
    def of(cls, signs: Tensor, scale: Tensor) -> Binary:
        """Of `signs` (rows, columns) bool, True for +1, and a `scale` (rows, 1) or (1, 1)."""
        rows, columns = signs.shape
        return cls((rows, columns), columns, signs, Scales(scale.half()))

    def levels(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return self.codes[rows].float().mul_(2).sub_(1).unsqueeze(1)

    def parts(self) -> dict[str, Tensor]:
        return {"codes": pack_plane(self.codes.to(torch.uint8), 1), **self.scales.parts()}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(cls, shape, settings, parts):
        return cls.of(unpack_plane(parts["codes"], 1, shape[1]).bool(), parts["scales"])


@dataclass(frozen=True)
class Sparse(Encoding):
    """A mask of what is not zero, and of the encoding of the whole matrix only the codes (or values) in it.

    Lossless beside `inner`, which is Dense, Affine with whole zero points, or Codebook with codewords of one weight and
    rows in their own order.
    """

    kind = "sparse"
    inner: Dense | Affine | Codebook

    @cached_property
    def mask(self) -> Tensor:
        """What is not zero: bool (rows, columns)."""
        return self.inner.decode() != 0

    def decode(self) -> Tensor:
        return self.inner.decode()

    def parts(self) -> dict[str, Tensor]:
        parts = {"mask": pack_plane(self.mask.to(torch.uint8), 1)}
        if isinstance(self.inner, Dense):
            return parts | {"weight": self.inner.values[self.mask].unsqueeze(0)}
        kept = self.inner.codes[:, : self.shape[1]][self.mask].unsqueeze(0)
        others = {name: part for name, part in self.inner.parts().items() if not name.startswith("codes")}
        return parts | others | _plane_parts(kept, self.inner.code_bits)

    def settings(self) -> dict[str, Any]:
        return {"inner": describe(self.inner)}

    @classmethod
    def rebuild(cls, shape, settings, parts):
        mask = unpack_plane(parts["mask"], 1, shape[1]).bool()
        inner = settings["inner"]
        if inner["kind"] == "dense":
            values = torch.zeros(shape, dtype=parts["weight"].dtype, device=mask.device)
            values[mask] = parts["weight"].flatten()
            return cls(shape, Dense(shape, values))
        bits = inner["bits"] if inner["kind"] == "affine" else inner["width"]
        kept = unpack(_planes(parts, bits), bits, int(mask.sum())).flatten()
        columns = n_groups(shape[1], inner["group"]) * inner["group"]
        hollow = {name: part for name, part in parts.items() if name != "mask" and not name.startswith("codes")}
        hollow |= _plane_parts(kept.new_zeros(shape[0], columns), bits)
        whole = restore(inner, hollow)
        if not isinstance(whole, (Affine, Codebook)):
            raise ValueError(f"sparse codes of '{whole.kind}', which has none")
        codes = whole.zero_codes()
        codes[:, : shape[1]][mask] = kept
        return cls(shape, dataclasses.replace(whole, codes=codes))


@dataclass(frozen=True)
class Refined(Encoding):
    """A table of which some rows count more: `inner` of all rows, and `extra` of what it leaves of `rows`.

    rows (n,) ascending, distinct; extra (n, columns). ŵ = inner, + extra in these rows.
    """

    kind = "refined"
    inner: Affine
    extra: Affine
    rows: Tensor

    def decode(self) -> Tensor:
        return self.inner.decode().index_add_(0, self.rows.long(), self.extra.decode())

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        extra, at = self.extra.decode(), self.rows.long()
        for rows, piece in self.inner.pieces():
            inside = (at >= rows.start) & (at < rows.stop)
            yield rows, piece.index_add_(0, at[inside] - rows.start, extra[inside])

    def parts(self) -> dict[str, Tensor]:
        halves = (("inner", self.inner), ("extra", self.extra))
        parts = {f"{name}.{part}": values for name, half in halves for part, values in half.parts().items()}
        return parts | {"rows": self.rows.int()}

    def settings(self) -> dict[str, Any]:
        return {"inner": describe(self.inner), "extra": describe(self.extra)}

    @classmethod
    def rebuild(cls, shape, settings, parts):
        inner, extra = (restore(settings[half], parts_under(half, parts)) for half in ("inner", "extra"))
        if not (isinstance(inner, Affine) and isinstance(extra, Affine)):
            raise ValueError(f"grids of kinds '{inner.kind}' and '{extra.kind}', where both are affine")
        return cls(shape, inner, extra, parts["rows"])


def parts_under(prefix: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Of `parts` those that belong to one encoding within another, by their own names."""
    return {name.removeprefix(f"{prefix}."): part for name, part in parts.items() if name.startswith(f"{prefix}.")}


ENCODINGS: tuple[type[Encoding], ...] = (
    Dense,
    Affine,
    Codebook,
    Binary,
    Sparse,
    Refined,
)
KINDS: dict[str, type[Encoding]] = {encoding.kind: encoding for encoding in ENCODINGS}


def describe(encoding: Encoding) -> dict[str, Any]:
    """Plain JSON that, with the parts, restores the `encoding`."""
    return {"kind": encoding.kind, "shape": list(encoding.shape), **encoding.settings()}


def restore(description: dict[str, Any], parts: dict[str, Tensor]) -> Encoding:
    """The encoding that a `description` of `describe` and its `parts()` came from.

    Raises:
        ValueError: There is no such kind.
    """
    kind = KINDS.get(description["kind"])
    if kind is None:
        raise ValueError(f"unknown encoding '{description['kind']}'; known: {', '.join(KINDS)}")
    return kind.rebuild(tuple(description["shape"]), description, parts)
