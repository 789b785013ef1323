"""Uniform grids in groups of columns, with or without error feedback: the baselines, and the 4- and 8-bit encoder.

Round-to-nearest with a searched scale; GPTQ (Frantar et al., arXiv 2210.17323); HQQ, half-quadratic quantisation
(Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compressor.core.encoding import Affine as AffineEncoding
from compressor.core.encoding import Scales
from compressor.core.settings import AffineSettings
from compressor.core.spec import group_columns
from compressor.ops.error_feedback import error_feedback, inverse_factor
from compressor.ops.grids import code, search_scale

_ROWS = 8192
"""Encoded at a time: tables have many rows, and every step holds several copies of them."""
_HEADROOM = 1.25
"""Of a row's 8-bit scales: errors that are fed forward may let a group grow."""


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


class Affine(AffineSettings):
    """A grid per group; see the module for the methods."""

    def encode(
        self, weight: Tensor, hessian: Tensor | None, generator: torch.Generator, mask: Tensor | None = None
    ) -> AffineEncoding:
        """The encoding of a matrix (out, in); `hessian` (in, in), the inputs' second moment, is needed by gptq.

        Where `mask` (out, in) is False the weight is 0 and stays so.
        """
        n_rows, columns = weight.shape
        group = group_columns(self.group, columns)
        factor = None
        if self.method == "gptq" and hessian is not None:
            padding = -columns % group
            factor = inverse_factor(functional.pad(hessian, (0, padding, 0, padding)), self.damping)
        masks = [None] * -(-n_rows // _ROWS) if mask is None else mask.split(_ROWS)
        parts = zip(weight.split(_ROWS), masks, strict=True)
        found = [self._encode_rows(rows, kept, factor, group) for rows, kept in parts]
        codes, scale, zero, top = (torch.cat(parts) for parts in zip(*found, strict=True))
        point: float | Tensor = float(zero[0, 0]) if self.zero != "learned" else zero.int()
        stored = Scales.of(scale)
        if self.scale_bits == 8:
            stored = Scales((scale / (top.float() / 255)).round().to(torch.uint8), top)
        return AffineEncoding((n_rows, columns), self.bits, group, codes, stored, point)

    def _encode_rows(
        self, weight: Tensor, mask: Tensor | None, factor: Tensor | None, group: int
    ) -> tuple[Tensor, ...]:
        """Codes (rows, columns) uint8, scales and zeros (rows, n_groups), and the largest stored scale (rows, 1).

        Rows know nothing of one another.
        """
        n_rows = len(weight)
        weight = functional.pad(weight.float(), (0, -weight.shape[1] % group))
        groups = weight.view(n_rows, -1, group)
        free, _ = self._grids(groups, 1.0, None)
        top = (free.abs().amax(1, keepdim=True) * (_HEADROOM if factor is not None else 1.0)).clamp_min(1e-6).half()
        scale, zero = self._grids(groups, 1.0, top)
        if factor is not None:
            emphasis = factor.diagonal().pow(-2)

            def quantise(begin: int, current: Tensor, _: Tensor) -> Tensor:
                at = begin // group
                if begin % group == 0:
                    found = self._grids(current[:, :group].unsqueeze(1), emphasis[begin : begin + group], top)
                    scale[:, at : at + 1], zero[:, at : at + 1] = found
                s, z = scale[:, at : at + 1], zero[:, at : at + 1]
                values = (code(current[:, :1], s, z, self.bits) - z) * s
                return values if mask is None or begin >= mask.shape[1] else values * mask[:, begin : begin + 1]

            weight = error_feedback(weight, factor, 1, quantise, group * max(1, 64 // group))
        codes = code(weight.view(n_rows, -1, group), scale.unsqueeze(2), zero.unsqueeze(2), self.bits)
        return codes.flatten(1).to(torch.uint8), scale, zero, top

    def _grids(self, groups: Tensor, emphasis: Tensor | float, top: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scales and zeros (rows, n_groups); scales as they are stored, in 8 bits as shares of `top`."""
        scale, zero = search_scale(groups, self.bits, self.zero, emphasis, signed=self.scale_bits == 16)
        if self.method == "hqq" and self.zero == "learned":
            zero = hqq_zero(groups, scale, zero, self.bits).round().clamp(0, 2**self.bits - 1)
        scale = scale.squeeze(-1)
        if self.scale_bits == 16:
            scale = torch.where(scale.abs() < 6.2e-5, 6.2e-5, scale).half().float()
        elif top is not None:
            step = top.float() / 255
            scale = (scale / step).round().clamp(1, 255) * step
        return scale, zero.squeeze(-1)
