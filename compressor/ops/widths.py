"""Widths and counts of packed codes: plain integers, so that sizes are known without torch."""

from __future__ import annotations

FINE_BITS = 8
"""Of a fine zero point."""


def plane_widths(bits: int) -> tuple[int, ...]:
    """The powers of two that sum to `bits`, largest first; the first plane holds the lowest bits of a code.

    >>> plane_widths(3), plane_widths(12), plane_widths(8)
    ((2, 1), (8, 4), (8,))
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"codes have 1 to 16 bits, not {bits}")
    return tuple(width for width in (16, 8, 4, 2, 1) if bits & width)


def packed_columns(n_codes: int, width: int) -> int:
    """Bytes that `n_codes` codes of a power-of-two `width` take, rounded up to whole bytes."""
    return -(-n_codes * width // 8)


def n_groups(columns: int, group: int) -> int:
    """Groups of `group` columns, the last one perhaps short."""
    return -(-columns // group)


def zero_steps(zero: str, bits: int) -> int:
    """Of how many parts of a code's step zero points are multiples: fine ones have 8 bits over the range of codes.

    >>> zero_steps("fine", 4), zero_steps("learned", 4)
    (16, 1)
    """
    return 2 ** max(0, FINE_BITS - bits) if zero == "fine" else 1


def zero_bits(bits: int, steps: int) -> int:
    """Bits that a zero point in parts of 1/steps takes."""
    return FINE_BITS if steps > 1 else bits


def rows_before(width: int, window: int | None) -> int:
    """Rows of codes before the first of a matrix that a window of so many bits reaches into; 0 where there is none.

    >>> rows_before(5, 12), rows_before(6, 12), rows_before(8, None)
    (2, 1, 0)
    """
    return 0 if window is None else -(-window // width) - 1
