"""The states of a trellis from the codes down its columns, as nodes that fold: one convolution over rows.

A state is the last bits of the codes: Σ code·2^(bits it lies above), over a row and the rows before it, which is an
integer convolution whose kernel is those powers. Kernels hold bytes, so what lies higher, or is cut off by the window,
goes through a second channel in which it is shifted already.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from compressor.export.forms import bits_apart
from compressor.export.parts import Parts
from compressor.ops.widths import rows_before


def states(parts: Parts, looked_up: Callable[[tuple[int, ...]], ir.Value]) -> ir.Value:
    """int32 (1, 1, rows, codes of a row): the state of each. A shape is a copy while onnxruntime folds.

    Args:
        looked_up: What each code becomes by a tuple of bytes: uint8, (rows before + rows) · codes of a row, any shape.
    """
    b, description = parts.builder, parts.description
    width, window, n = description["width"], description["window"], parts.codes.n
    before, apart = rows_before(width, window), bits_apart(width, window)
    kernel = np.zeros((1, 2 if apart else 1, before + 1, 1), np.uint8)
    shift = min(8 - apart, before * width)
    for back in range(before + 1):
        high = apart and back == before
        kernel[0, int(high), before - back, 0] = 2 ** (back * width - (shift if high else 0))
    channels = [looked_up(tuple(range(2**width)))]
    if apart:
        channels.append(looked_up(tuple(code % 2**apart << shift for code in range(2**width))))
    rows = parts.rows[1] - parts.rows[0]
    planes = [b.reshape(channel, 1, 1, rows + before, n) for channel in channels]
    image = planes[0] if len(planes) == 1 else b.op("Concat", *planes, axis=1)
    return b.op("ConvInteger", image, b.constant(kernel))
