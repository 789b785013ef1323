"""What onnxruntime's kernels are given for an encoding: chosen from its description alone, before a weight is read.

`KINDS` has an entry for every kind of encoding that a graph can hold: how its codes lie, what they stand for, and which
*form* a product takes. A form is the operand of `MatMulNBits`: values of 2, 4 or 8 bits in blocks of columns,
v = scale · (value − zero). Some encodings are stored as the kernel wants them (direct); for others each stored byte is
looked up in a table, which onnxruntime folds when it loads. What has no entry is refused by name. Measurements:
docs/runtime.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from compressor.ops.widths import n_groups, plane_widths, rows_before

Mode = Literal["default", "standard", "compat"]
MODES: tuple[Mode, ...] = ("default", "standard", "compat")
FOLD_LIMIT = 2**30


@dataclass(frozen=True)
class Form:
    """How MatMulNBits gets a matrix.

    bits, block   of the kernel
    direct        the stored codes are the kernel's values
    values        else: kernel value per code (planes combine by OR); None for a codebook
    zero          the constant zero point where it is not the kernel's default, 2**(bits−1)
    factor        what the stored scales are multiplied by
    shifted       the kernel's zero points are whole numbers, and the stored ones are not: what is between them is added
                  to the product, a sum of each block's inputs at a time
    """

    bits: int
    block: int
    direct: bool = False
    values: tuple[int, ...] | None = None
    zero: int | None = None
    factor: float = 1.0
    shifted: bool = False


@dataclass(frozen=True)
class Plane:
    """How digits lie in stored bytes: `per` of them, each below `radix`, in `nbytes` bytes, the lowest first."""

    radix: int
    per: int
    nbytes: int = 1

    @classmethod
    def of_bits(cls, width: int) -> Plane:
        """Of digits of 1, 2, 4, 8 or 16 bits."""
        return cls(2**width, max(1, 8 // width), max(1, width // 8))

    def stored(self, n: int) -> int:
        """Bytes of `n` digits."""
        return -(-n // self.per) * self.nbytes


def planes_of(bits: int) -> tuple[Plane, ...]:
    """The planes of codes of `bits` bits, lowest bits first."""
    return tuple(Plane.of_bits(width) for width in plane_widths(bits))


@dataclass(frozen=True)
class Codes:
    """The codes of a stored row: `n` of them, each the sum of its digits in the planes, lowest first."""

    n: int
    planes: tuple[Plane, ...]

    @property
    def one_by_one(self) -> bool:
        """Whether each is unpacked to a number of its own on the way to a kernel, and not a byte of them at once."""
        return len(self.planes) > 1 or any(8 % plane.per for plane in self.planes)


def kernel_block(columns: int, group: int, bits: int) -> int | None:
    """The kernel's block for groups of `group` columns: it divides the group; None where none does."""
    known = (128, 64, 32) if bits == 2 else (256, 128, 64, 32, 16)
    if group in known:
        return group
    if group >= columns:
        return next((block for block in (128, 64, 32) if columns % block == 0), 32)
    return next((block for block in known if block <= 128 and group % block == 0), None)


def _runs_int2(description: dict[str, Any], mode: Mode) -> bool:
    """Whether the int2 kernel may be used. onnxruntime 1.32 fuses DequantizeLinear over UINT2 wrongly, without a
    word, where the rows are no multiple of the four values of a byte."""
    return mode == "default" or (mode == "standard" and description["shape"][0] % 4 == 0)


def _group(description: dict[str, Any]) -> int:
    return description.get("group", description["shape"][1])


def _padded(description: dict[str, Any]) -> int:
    """Columns in whole groups."""
    return n_groups(description["shape"][1], _group(description)) * _group(description)


class Kind(ABC):
    """What a graph makes of one kind of encoding, by its description."""

    @abstractmethod
    def refusal(self, description: dict[str, Any], operator: str, mode: Mode) -> str | None:
        """As `refusal`, below."""

    def form(self, description: dict[str, Any], mode: Mode) -> Form | None:
        """As `form`, below."""
        return None

    def is_int8(self, description: dict[str, Any]) -> bool:
        """Whether codes stand for evenly spaced whole numbers of 8 bits, and outputs have one scale each."""
        return False


class Coded(Kind):
    """Codes, what they stand for, and a scale for each group of columns: what a graph can unpack."""

    @abstractmethod
    def codes(self, description: dict[str, Any]) -> Codes:
        """How the codes of a row lie."""

    @abstractmethod
    def levels(self, description: dict[str, Any]) -> tuple[float, ...] | None:
        """What each code stands for, before groups' own zero points are taken off; None: for a stored codeword."""

    @abstractmethod
    def no_form(self, description: dict[str, Any], mode: Mode) -> str:
        """Why there is no form."""

    def refusal(self, description: dict[str, Any], operator: str, mode: Mode) -> str | None:
        if operator == "constant":
            if 4 * description["shape"][0] * description["shape"][1] > FOLD_LIMIT:
                return "more than 1 GiB of float32: onnxruntime does not fold it; keep this tensor dense"
            return None
        return None if self.form(description, mode) is not None else self.no_form(description, mode)


LARGEST_FACTOR = 128
"""By which codes are multiplied as they are joined to states: factors are bytes, and sums stay far within 32 bits."""


def bits_apart(width: int, window: int) -> int:
    """How many bits of the furthest row's code go through a channel of their own on the way to a state of so many bits:
    those that are cut off, or lie too high for a factor; 0 where all are as the others."""
    lowest = rows_before(width, window) * width
    kept = min(width, window - lowest)
    return kept if kept < width or 2**lowest > LARGEST_FACTOR else 0


def _no_block(description: dict[str, Any]) -> str:
    return f"groups of {_group(description)} columns are no multiple of 16, nor a whole row"


@dataclass(frozen=True)
class Levels(Coded):
    """Codes that stand for the same whole numbers everywhere: `per_byte` of them in a byte, the lowest first."""

    numbers: tuple[int, ...]
    per_byte: int

    def codes(self, description: dict[str, Any]) -> Codes:
        return Codes(_padded(description), (Plane(len(self.numbers), self.per_byte),))

    def levels(self, description: dict[str, Any]) -> tuple[float, ...]:
        return tuple(map(float, self.numbers))

    def form(self, description: dict[str, Any], mode: Mode) -> Form | None:
        for bits in (2, 4) if mode == "compat" else (2, 4, 8):
            values = tuple(number + 2 ** (bits - 1) for number in self.numbers)
            block = kernel_block(description["shape"][1], _group(description), bits)
            fits = min(values) >= 0 and max(values) < 2**bits and (bits > 2 or _runs_int2(description, mode))
            if fits and block is not None:
                return Form(bits, block, values=values)
        return None

    def no_form(self, description: dict[str, Any], mode: Mode) -> str:
        return _no_block(description)

    def is_int8(self, description: dict[str, Any]) -> bool:
        steps = {after - before for before, after in zip(self.numbers, self.numbers[1:], strict=False)}
        within = self.numbers[0] >= -128 and self.numbers[-1] <= 127
        return len(steps) == 1 and within and _group(description) >= description["shape"][1]


class AffineKind(Coded):
    """Codes of 1 to 8 bits less a zero point: the same for all groups, or of each its own."""

    def codes(self, description: dict[str, Any]) -> Codes:
        return Codes(_padded(description), planes_of(description["bits"]))

    def levels(self, description: dict[str, Any]) -> tuple[float, ...]:
        return tuple(code - (description["zero"] or 0.0) for code in range(2 ** description["bits"]))

    def form(self, description: dict[str, Any], mode: Mode) -> Form | None:
        columns, bits, group = description["shape"][1], description["bits"], description["group"]
        zero = description["zero"]
        half = zero is not None and zero != int(zero)
        native, steps = mode != "compat", description.get("zero_steps", 1)
        if steps > 1 and mode == "standard":  # a second copy is written: of 8 bits, whose zero points are as fine
            block = kernel_block(columns, group, 8)
            return Form(8, block, values=tuple(steps * q for q in range(2**bits)), factor=1 / steps) if block else None
        kernel = 2 * bits if half and bits == 4 else bits if bits in (4, 8) else 4
        if bits == 2 and _runs_int2(description, mode) and not half and kernel_block(columns, group, 2):
            kernel = 2
        block = kernel_block(columns, group, kernel)
        if block is None or (half and bits == 8) or (kernel == 8 and not native):
            return None
        middle = 2 ** (kernel - 1)
        if kernel == bits:
            constant = None if zero in (None, middle) else int(zero)
            return Form(kernel, block, direct=True, zero=constant, shifted=steps > 1)
        codes = range(2**bits)
        values = tuple(2 * q + 1 for q in codes) if half else tuple(codes)
        if zero is None:
            return Form(kernel, block, values=values, shifted=steps > 1)
        kernel_zero = int(2 * zero + 1) if half else int(zero)
        shifted = tuple(value - kernel_zero + middle for value in values)
        if len(plane_widths(bits)) == 1 and min(shifted) >= 0 and max(shifted) < 2**kernel:
            values, kernel_zero = shifted, middle
        return Form(kernel, block, values=values, zero=None if kernel_zero == middle else kernel_zero,
                    factor=0.5 if half else 1.0)  # fmt: skip

    def no_form(self, description: dict[str, Any], mode: Mode) -> str:
        bits, zero = description["bits"], description["zero"]
        if mode == "compat" and bits == 8:
            return "8 bits crawl or fail in onnxruntime before 1.22: 2 to 4 bits, or without --compat"
        if bits == 8 and zero not in (None, 128):
            return f"a zero point of {zero} at {bits} bits has no kernel; use the midpoint"
        return _no_block(description)

    def is_int8(self, description: dict[str, Any]) -> bool:
        whole_rows = description["group"] >= description["shape"][1]
        return description["bits"] == 8 and description["zero"] == 128 and whole_rows


class CodebookKind(Coded):
    """Codes of codewords in a stored table, on the int4 grid or free."""

    def codes(self, description: dict[str, Any]) -> Codes:
        return Codes(_padded(description) // description["dim"], planes_of(description["width"]))

    def levels(self, description: dict[str, Any]) -> None:
        return None

    def refusal(self, description: dict[str, Any], operator: str, mode: Mode) -> str | None:
        if operator == "embedding" and "window" in description:
            return "a trellis cannot be read row by row: keep tables affine"
        return super().refusal(description, operator, mode)

    def form(self, description: dict[str, Any], mode: Mode) -> Form | None:
        dim = description["dim"]
        block = kernel_block(description["shape"][1], description["group"], 4)
        if description["grid"] != "int4" or block is None or dim not in (1, 2, 4, 8):
            return None
        return None if dim == 1 and description["width"] > 4 else Form(4, block)

    def no_form(self, description: dict[str, Any], mode: Mode) -> str:
        if description["grid"] == "free":
            return "free codewords only with --format safetensors; onnxruntime needs the int4 grid"
        if description["dim"] not in (1, 2, 4, 8):
            return f"codewords of {description['dim']} weights have no kernel; use 1, 2, 4 or 8"
        if description["dim"] == 1 and description["width"] > 4:
            return "single-weight codebooks have at most 4 bits; use affine 8 bits"
        return _no_block(description)


class DenseKind(Kind):
    """The values as they are."""

    def refusal(self, description: dict[str, Any], operator: str, mode: Mode) -> str | None:
        return None


class SparseKind(Kind):
    """A mask, and the codes in it."""

    def refusal(self, description: dict[str, Any], operator: str, mode: Mode) -> str | None:
        return "sparse tensors do not run faster in onnxruntime and unpack slowly: only with --format safetensors"


class RefinedKind(Kind):
    """Two grids, which are lowered one by one."""

    def refusal(self, description: dict[str, Any], operator: str, mode: Mode) -> str | None:
        halves = (description["inner"], description["extra"])
        return next((reason for half in halves if (reason := refusal(half, operator, mode))), None)


KINDS: dict[str, Kind] = {
    "dense": DenseKind(),
    "affine": AffineKind(),
    "codebook": CodebookKind(),
    "binary": Levels((-1, 1), per_byte=8),
    "sparse": SparseKind(),
    "refined": RefinedKind(),
}


def form(description: dict[str, Any], mode: Mode) -> Form | None:
    """The form of an encoding, or None where `refusal` has the reason or the encoding is dense."""
    kind = KINDS.get(description["kind"])
    return None if kind is None else kind.form(description, mode)


def refusal(description: dict[str, Any], operator: str, mode: Mode = "default") -> str | None:
    """Why the pair (encoding, operator) cannot be written to ONNX, or None. Operators: matmul, embedding, constant."""
    kind = KINDS.get(description["kind"])
    if kind is None:
        return f"encoding '{description['kind']}' has no operator: only with --format safetensors"
    return kind.refusal(description, operator, mode)


def coded(description: dict[str, Any]) -> Coded:
    """The entry of an encoding that has codes."""
    kind = KINDS[description["kind"]]
    assert isinstance(kind, Coded)
    return kind


def int8_refusal(description: dict[str, Any]) -> str | None:
    """Why a convolution with this encoding cannot compute on int8 activations, or None."""
    wanted = "activations: static_int8 needs convolutions from affine with bits: 8, group: row, zero: middle"
    kind = KINDS.get(description["kind"])
    if kind is not None and kind.is_int8(description):
        return None
    if description["kind"] != "affine":
        return f"{wanted}; found {description['kind']}"
    zero = "learned" if description["zero"] is None else f"{description['zero']:g}"
    return f"{wanted}; found bits {description['bits']}, groups of {description['group']}, zero {zero}"


def least_version(descriptions: list[dict[str, Any]], mode: Mode = "default") -> str:
    """The oldest onnxruntime that runs these encodings fast; each was tried."""
    halves = [description.get("extra", description) for description in descriptions]
    halves += [description["inner"] for description in descriptions if description["kind"] == "refined"]
    forms = [chosen for chosen in (form(description, mode) for description in halves) if chosen]
    if any(chosen.bits == 2 for chosen in forms):
        return "1.29"
    return {"default": "1.23", "standard": "1.24", "compat": "1.20"}[mode]
