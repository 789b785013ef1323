"""Packed codes come back, and lie where onnxruntime looks for them."""

from __future__ import annotations

import pytest
import torch

from compressor.ops.packing import pack, pack_plane, packed_columns, plane_widths, unpack


def codes_of(bits: int, rows: int, n: int) -> torch.Tensor:
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    codes[0, :2] = torch.tensor([2**bits - 1, 0])
    return codes


@pytest.mark.parametrize("shape", [(5, 37), (3, 64), (7, 3)])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_comes_back(bits, shape):
    codes = codes_of(bits, *shape)
    planes = pack(codes, bits)
    assert [plane.shape[1] for plane in planes] == [packed_columns(shape[1], width) for width in plane_widths(bits)]
    assert {plane.dtype for plane in planes} == {torch.uint8}
    found = unpack(planes, bits, shape[1])
    assert found.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    torch.testing.assert_close(found.int(), codes, rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_a_plane_holds_code_i_at_bit_i_times_width(width):
    codes = codes_of(width, 3, 13)
    packed = pack_plane(codes, width)
    for row, line in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (i * width) for i, code in enumerate(row))
        assert line == list(number.to_bytes(len(line), "little"))


@pytest.mark.parametrize("bits", [3, 5, 9, 12])
def test_the_first_plane_holds_the_lowest_bits(bits):
    codes = codes_of(bits, 3, 13)
    lowest = plane_widths(bits)[0]
    torch.testing.assert_close(pack(codes, bits)[0], pack_plane(codes & (2**lowest - 1), lowest), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0, 17])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"codes have 1 to 16 bits, not {bits}"):
        plane_widths(bits)
