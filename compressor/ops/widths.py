"""Widths and counts of packed codes: plain integers, so that sizes are known without torch."""

from __future__ import annotations


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
