"""Uniform grids in groups of columns, with or without error feedback: the baselines, and the 4- and 8-bit encoder.

Round-to-nearest with a searched scale; GPTQ (Frantar et al., arXiv 2210.17323); HQQ, half-quadratic quantisation
(Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.core.contract import Statistics, WeightPass
from compressor.core.encoding import Affine as AffineEncoding
from compressor.core.encoding import Scales
from compressor.core.spec import ZEROS, group_columns
from compressor.ops.descent import descend
from compressor.ops.error_feedback import inverse_factor
from compressor.ops.grids import code, nearest_zero
from compressor.ops.uniform import Grid
from compressor.ops.widths import n_groups, zero_steps
from compressor.passes.settings.affine import AffineSettings

_VALUES = 2048 * 576
"""Encoded at a time: tables have many rows, and every step holds several copies of them."""


def hqq_zero(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, iterations: int = 20) -> Tensor:
    """The zero point (…, 1) that HQQ finds for groups (…, size): min ‖W − Ŵ‖_p, p = 0.7, by half-quadratic splitting.

    Each round shrinks the error, e = sgn(d)·relu(|d| − |d|^(p−1)/β), and takes z = mean(q − (w − e)/s).
    """
    p, beta = 0.7, 10.0
    for _ in range(iterations):
        quantised = code(groups, scale, zero, bits)
        error = groups - scale * (quantised - zero)
        size = error.abs()
        kept = error.sign() * functional.relu(size - (size + 1e-12).pow(p - 1) / beta)
        zero = (quantised - (groups - kept) / scale).mean(-1, keepdim=True)
        beta *= 1.01
    return zero


class Affine(AffineSettings, WeightPass):
    """A grid per group; see the module for the methods."""

    def encode(self, matrix: Tensor, known: Statistics, generator: torch.Generator) -> AffineEncoding:
        """Of a matrix (out, in); gptq is nearest rounding where the hessian is not known."""
        hessian = known.hessian
        (n_rows, columns), place = matrix.shape, matrix.device
        group = group_columns(self.group, columns)
        factor, padding = None, -columns % group
        if self.method == "gptq" and hessian is not None:
            hessian = functional.pad(hessian, (0, padding, 0, padding)) if padding else hessian
            factor = inverse_factor(hessian, self.damping)
        grid = Grid(self.bits, group, self.zero, self.scale_bits, self._refine if self.method == "hqq" else None)
        at_once = max(1, _VALUES // columns)
        masks = [None] * -(-n_rows // at_once) if known.kept is None else known.kept.split(at_once)
        # whole at once: pieces that stay keep what is freed between them
        codes = torch.empty(n_rows, columns + padding, dtype=torch.uint8, device=place)
        scale, zero = (torch.empty(n_rows, n_groups(columns, group), device=place) for _ in range(2))
        top = torch.empty(n_rows, 1, dtype=torch.float16, device=place)
        for begin, rows, kept in zip(range(0, n_rows, at_once), matrix.split(at_once), masks, strict=True):
            fitted = grid.fit(rows, kept, factor)
            if factor is not None and hessian is not None and self.sweeps:
                pull = functional.pad(rows.float(), (0, padding)) @ hessian
                fitted = descend(fitted, hessian, pull, self.sweeps, _padded(kept, padding), self.scale_bits)
            for whole, part in ((codes, fitted.codes), (scale, fitted.scale), (zero, fitted.zero), (top, fitted.top)):
                whole[begin : begin + at_once] = part
        steps = zero_steps(self.zero, self.bits)
        point: float | Tensor = float(zero[0, 0]) if self.zero in ZEROS else zero if steps > 1 else zero.int()
        stored = Scales.of(scale)
        if self.scale_bits == 8:
            stored = Scales((scale / (top.float() / 255)).round().to(torch.uint8), top)
        return AffineEncoding((n_rows, columns), group, codes, stored, self.bits, point, steps)

    def _refine(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.zero in ZEROS:
            return zero
        return nearest_zero(hqq_zero(groups, scale, zero, self.bits), self.bits, self.zero)


def _padded(mask: Tensor | None, padding: int) -> Tensor | None:
    return None if mask is None else functional.pad(mask, (0, padding), value=True)
