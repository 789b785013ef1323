"""Packing of small integers into bytes, to the bit.

Codes are little-endian within a byte: code i of a row sits at bit (i mod per)·width, which is the layout of
onnxruntime's MatMulNBits and GatherBlockQuantized. A width that is no power of two is split into planes (3 = 2 + 1,
12 = 8 + 4), each packed on its own, so that a plain table look-up unpacks any of them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compressor.ops.widths import packed_columns, plane_widths

__all__ = ["pack", "pack_plane", "packed_columns", "plane_widths", "unpack", "unpack_plane"]


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """Packs codes (rows, n) below 2**width into uint8 (rows, bytes); `width` is 1, 2, 4, 8 or 16."""
    rows, n = codes.shape
    if width == 8:
        return codes.to(torch.uint8)
    if width == 16:
        wide = codes.to(torch.int32)
        return torch.stack((wide & 255, wide >> 8), dim=-1).to(torch.uint8).reshape(rows, 2 * n)
    per = 8 // width
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -n % per)).view(rows, -1, per)
    packed = padded[..., 0].clone()
    for i in range(1, per):
        packed |= padded[..., i] << (i * width)
    return packed


def unpack_plane(packed: Tensor, width: int, n_codes: int) -> Tensor:
    """The inverse of `pack_plane`: (rows, bytes) uint8 to (rows, n_codes) uint8, int32 for 16 bits."""
    rows = packed.shape[0]
    if width == 8:
        return packed[:, :n_codes]
    if width == 16:
        pairs = packed.view(rows, -1, 2).to(torch.int32)
        return (pairs[..., 0] | pairs[..., 1] << 8)[:, :n_codes]
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    spread = (packed.unsqueeze(-1) >> shifts) & (2**width - 1)
    return spread.reshape(rows, -1)[:, :n_codes]


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Packs codes (rows, n) below 2**bits into one uint8 array per plane of `plane_widths(bits)`."""
    if len(plane_widths(bits)) == 1:
        return [pack_plane(codes, bits)]
    planes, shift = [], 0
    whole = codes.to(torch.uint8 if bits <= 8 else torch.int32)  # of a table four bytes each are much
    for width in plane_widths(bits):
        planes.append(pack_plane((whole >> shift) & (2**width - 1), width))
        shift += width
    return planes


def unpack(planes: list[Tensor], bits: int, n_codes: int) -> Tensor:
    """The inverse of `pack`: codes (rows, n_codes), uint8 up to 8 bits, else int32."""
    parts, shift = list[Tensor](), 0
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        parts.append(unpack_plane(plane, width, n_codes).to(torch.uint8 if bits <= 8 else torch.int32) << shift)
        shift += width
    return functools.reduce(torch.bitwise_or, parts)
