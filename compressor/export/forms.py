"""What onnxruntime's kernels are given for an encoding: chosen from its description alone, before a weight is read.

A *form* is the operand of `MatMulNBits`: values of 2, 4 or 8 bits in blocks of columns, v = scale · (value − zero).
Some encodings are stored as the kernel wants them (direct); for others each stored byte is looked up in a table, which
onnxruntime folds when it loads. Measurements: docs/runtime.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from compressor.ops.widths import n_groups, plane_widths

Mode = Literal["default", "standard", "compat"]
MODES: tuple[Mode, ...] = ("default", "standard", "compat")
FOLD_LIMIT = 2**30


@dataclass(frozen=True)
class Form:
    """How MatMulNBits gets a matrix.

    bits, block   of the kernel
    direct        the stored codes are the kernel's values
    values        else: kernel value per code, for Affine and Binary (planes combine by OR); None for a codebook
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


def kernel_block(columns: int, group: int, bits: int) -> int | None:
    """The kernel's block for groups of `group` columns: it divides the group; None where none does."""
    known = (128, 64, 32) if bits == 2 else (256, 128, 64, 32, 16)
    if group in known:
        return group
    if group >= columns:
        return next((block for block in (128, 64, 32) if columns % block == 0), 32)
    return next((block for block in known if block <= 128 and group % block == 0), None)


def form(description: dict[str, Any], mode: Mode) -> Form | None:
    """The form of an encoding, or None where `refusal` has the reason or the encoding is dense."""
    choose = {"affine": _affine_form, "codebook": _codebook_form, "binary": _binary_form}.get(description["kind"])
    return choose(description, mode) if choose else None


def _runs_int2(description: dict[str, Any], mode: Mode) -> bool:
    """Whether the int2 kernel may be used. onnxruntime 1.32 fuses DequantizeLinear over UINT2 wrongly, without a
    word, where the rows are no multiple of the four values of a byte."""
    return mode == "default" or (mode == "standard" and description["shape"][0] % 4 == 0)


def _affine_form(description: dict[str, Any], mode: Mode) -> Form | None:
    columns, bits, group = description["shape"][1], description["bits"], description["group"]
    zero = description["zero"]
    half = zero is not None and zero != int(zero)
    native, steps = mode != "compat", description.get("zero_steps", 1)
    if steps > 1 and mode == "standard":  # a second copy is written: it may be of 8 bits, whose zero points are as fine
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


def _codebook_form(description: dict[str, Any], mode: Mode) -> Form | None:
    dim = description["dim"]
    block = kernel_block(description["shape"][1], description["group"], 4)
    if description["grid"] != "int4" or block is None or dim not in (1, 2, 4, 8):
        return None
    return None if dim == 1 and description["width"] > 4 else Form(4, block)


def _binary_form(description: dict[str, Any], mode: Mode) -> Form:
    columns = description["shape"][1]
    kernel = 2 if _runs_int2(description, mode) else 4
    middle = 2 ** (kernel - 1)
    return Form(kernel, kernel_block(columns, columns, kernel) or 32, values=(middle - 1, middle + 1))


def refusal(description: dict[str, Any], operator: str, mode: Mode = "default") -> str | None:
    """Why the pair (encoding, operator) cannot be written to ONNX, or None. Operators: matmul, embedding, constant."""
    kind = description["kind"]
    if kind == "dense":
        return None
    if kind == "refined":
        halves = (description["inner"], description["extra"])
        return next((reason for half in halves if (reason := refusal(half, operator, mode))), None)
    if kind not in ("affine", "codebook", "binary", "sparse"):
        return f"encoding '{kind}' has no operator: only with --format safetensors"
    if kind == "sparse":
        return "sparse tensors do not run faster in onnxruntime and unpack slowly: only with --format safetensors"
    if operator == "constant":
        if 4 * description["shape"][0] * description["shape"][1] > FOLD_LIMIT:
            return "more than 1 GiB of float32: onnxruntime does not fold it; keep this tensor dense"
        return None
    if kind == "codebook" and description["grid"] == "free":
        return "free codewords only with --format safetensors; onnxruntime needs the int4 grid"
    if form(description, mode) is not None:
        return None
    if kind == "affine" and mode == "compat" and description["bits"] == 8:
        return "8 bits crawl or fail in onnxruntime before 1.22: 2 to 4 bits, or without --compat"
    if kind == "affine" and description["bits"] == 8 and description["zero"] not in (None, 128):
        return f"a zero point of {description['zero']} at {description['bits']} bits has no kernel; use the midpoint"
    if kind == "codebook" and description["dim"] not in (1, 2, 4, 8):
        return f"codewords of {description['dim']} weights have no kernel; use 1, 2, 4 or 8"
    if kind == "codebook" and description["dim"] == 1 and description["width"] > 4:
        return "single-weight codebooks have at most 4 bits; use affine 8 bits"
    return f"groups of {description['group']} columns are no multiple of 16, nor a whole row"


def int8_refusal(description: dict[str, Any]) -> str | None:
    """Why a convolution with this encoding cannot compute on int8 activations, or None."""
    wanted = "activations: static_int8 needs convolutions from affine with bits: 8, group: row, zero: middle"
    if description["kind"] == "binary":
        return None
    if description["kind"] != "affine":
        return f"{wanted}; found {description['kind']}"
    if description["bits"] != 8 or description["zero"] != 128 or description["group"] < description["shape"][1]:
        zero = "learned" if description["zero"] is None else f"{description['zero']:g}"
        return f"{wanted}; found bits {description['bits']}, groups of {description['group']}, zero {zero}"
    return None


def least_version(descriptions: list[dict[str, Any]], mode: Mode = "default") -> str:
    """The oldest onnxruntime that runs these encodings fast; each was tried."""
    halves = [description.get("extra", description) for description in descriptions]
    halves += [description["inner"] for description in descriptions if description["kind"] == "refined"]
    forms = [chosen for chosen in (form(description, mode) for description in halves) if chosen]
    if any(chosen.bits == 2 for chosen in forms):
        return "1.29"
    return {"default": "1.23", "standard": "1.24", "compat": "1.20"}[mode]


def stored_codes(description: dict[str, Any]) -> tuple[int, int]:
    """(codes per stored row, bits of a code)."""
    columns, kind = description["shape"][1], description["kind"]
    if kind == "binary":
        return columns, 1
    padded = n_groups(columns, description["group"]) * description["group"]
    return (padded // description["dim"], description["width"]) if kind == "codebook" else (padded, description["bits"])
