"""Codes and states of a bitshift trellis: a state is the last `window` bits of the codes down a column.

A step shifts the next code of `width` bits in at the bottom (QTIP: Tseng et al., arXiv 2406.11235).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.ops.widths import rows_before


def states_of(codes: Tensor, width: int, window: int) -> Tensor:
    """The state of each row, int32 (rows, n), of codes (rows before + rows, n)."""
    before = rows_before(width, window)
    rows = len(codes) - before
    states = torch.zeros(rows, codes.shape[1], dtype=torch.int32, device=codes.device)
    for back in range(before + 1):
        states |= codes[before - back : before - back + rows].int() << back * width
    return states & 2**window - 1


def codes_of(states: Tensor, width: int, window: int) -> Tensor:
    """The inverse: codes (rows before + rows, n) int32 of the states (rows, n) of a path; unused bits are 0."""
    before = rows_before(width, window)
    first = [states[:1] >> back * width & 2**width - 1 for back in range(before, 0, -1)]
    return torch.cat([*first, states & 2**width - 1]).int()
