"""JLCM: jointly learned codebooks and mappings (Yvinec, Dapogny, Bailly, arXiv 2309.17361, ICLR 2024).

The paper's text was not public to us. From its abstract: rows (neurons) are grouped by re-ordering, so that several
codebooks cost no mapping per weight; codebook and mapping are learned jointly per layer on the reconstruction of its
output; the gradient on the mapping decreases with the distance between codewords, a proximal search. The rest is our
design: codewords of several weights on the int4 grid, k-means weighted by the input's second moment, codes assigned
with error feedback (GPTQ, arXiv 2210.17323, in the block form of QuIP#, arXiv 2402.04396).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.core.contract import Statistics, WeightPass
from compressor.core.encoding import Codebook, Scales
from compressor.core.spec import group_columns
from compressor.ops.error_feedback import error_feedback, inverse_factor
from compressor.ops.gram import damped
from compressor.ops.sums import mean
from compressor.ops.vector_descent import best_codes
from compressor.ops.vector_quantization import (
    balanced_clusters,
    gaussian_codebook,
    kmeans,
    nearest,
    nearest_within,
    sparse_kmeans,
)
from compressor.passes.parts.codewords import group_scales, in_whole_groups, rescaled, snap
from compressor.passes.settings.jlcm import JlcmSettings

_QUANTILES = 16
_POINTS_PER_CODEWORD = 24
_PRUNED_RESOLUTION = 3.5
"""Grid steps per rms of what a pass has kept: its tails are lighter than a Gaussian's."""
_ROWS = 2048
"""That descend at a time, so that memory does not grow with the matrix."""
_RANDOM_START = 3
"""Times as many iterations of k-means where it starts from random points."""


def proximal_gradient(codebook: Tensor, current: int, upstream: float | Tensor, delta: float) -> Tensor:
    """∂L/∂I_k = g·sgn(C_k − c)·1/(|C_k − c| + δ), and 0 at the current codeword c: near codewords pull most.

    codebook (K,), current an index, upstream g = ∂L/∂ŵ a scalar; returns (K,).
    """
    distance = codebook - codebook[current]
    gradient = upstream * distance.sign() / (distance.abs() + delta)
    gradient[current] = 0.0
    return gradient


def codebook_gradient(upstream: Tensor, indices: Tensor, size: int, scale: Tensor | float) -> Tensor:
    """∂L/∂C_k = Σ_{i→k} s·g_i; upstream (n,) and indices (n,) to (size,); `scale` is a number or (n,)."""
    return torch.zeros(size, dtype=upstream.dtype).index_add_(0, indices, upstream * scale)


def row_features(weight: Tensor) -> Tensor:
    """A row's shape as 16 quantiles of w/rms: (rows, columns) to (rows, 16)."""
    scaled = weight / weight.pow(2).mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    ranked = scaled.sort(1).values
    at = torch.linspace(0, weight.shape[1] - 1, _QUANTILES).round().long()
    return ranked[:, at.to(ranked.device)]


@functools.lru_cache(maxsize=8)
def start(width: int, dim: int) -> tuple[Tensor, float]:
    """A codebook for unit Gaussian weights, and the resolution at which snapping it costs least."""
    generator = torch.Generator().manual_seed(0)
    codewords = gaussian_codebook(2**width, dim, generator)
    points = torch.randn(20_000, dim, generator=generator)

    def loss(resolution: float) -> float:
        grid = snap(codewords, resolution) / resolution
        return float(mean((points - grid[nearest(points, grid)]).pow(2)))

    return codewords, min((2.0, 2.3, 2.6, 3.0, 3.5, 4.0, 4.6, 5.2), key=loss)


class Jlcm(JlcmSettings, WeightPass):
    """Learned codebooks; see the module for the method."""

    def encode(self, matrix: Tensor, known: Statistics, generator: torch.Generator) -> Codebook:
        """Of a matrix (out, in); where a weight was dropped its codeword is 0."""
        n_rows, columns = matrix.shape
        mask, hessian = known.kept, known.moment(columns)
        group = group_columns(self.group, columns, self.dim)
        weight, hessian = in_whole_groups(matrix, hessian, group)
        kept = None if mask is None else torch.nn.functional.pad(mask, (0, -columns % group), value=True)
        resolution = start(self.width, self.dim)[1] if mask is None else _PRUNED_RESOLUTION
        scales = Scales.of(group_scales(weight[:, :columns], group, resolution), self.scale_bits)
        order, counts = self._order(weight)
        moment, size, found = hessian.diagonal(), scales.decode(), []
        for rows in order.split(counts):
            places = None if kept is None else kept[rows]
            found.append(self._table(weight[rows], size[rows] * resolution, moment, places, group, generator))
        table = torch.stack(found) * resolution
        table = snap(table, 1.0) if self.grid == "int4" else table.half().float()
        codes = self._assign(weight, hessian, size, table, kept, order, counts, group)
        if self.descent_rounds:
            scales = self._descend(weight, hessian, codes, scales, table, kept, order, counts)
        stored = Scales(scales.values[order], None if scales.row is None else scales.row[order])
        table = table.to(torch.int8 if self.grid == "int4" else torch.float16)
        return Codebook(
            (n_rows, columns), self.width, self.dim, group, codes[order].int(), table, stored, counts,
            None if len(counts) == 1 else order,
        )  # fmt: skip

    def _order(self, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        n = min(self.codebooks, len(weight))
        if n == 1:
            return torch.arange(len(weight), device=weight.device), (len(weight),)
        order, counts = balanced_clusters(row_features(weight).cpu(), n)  # a loop over rows
        return order.to(weight.device), counts

    def _table(
        self, weight: Tensor, rms: Tensor, moment: Tensor, kept: Tensor | None, group: int,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """A codebook (2**width, dim) of these rows in units of `rms`: k-means weighted with the root of the moment.

        With `kept`, codewords are zero in some places, and among them is zero itself.
        """
        first = start(self.width, self.dim)[0].to(weight.device)
        emphasis = (moment.view(-1, self.dim).mean(1) / moment.mean().clamp_min(1e-30)).sqrt().clamp_min(1e-3)
        scaled = weight.view(len(weight), -1, group) / rms.clamp_min(1e-12).unsqueeze(2)
        points = scaled.reshape(-1, self.dim)
        n_points = min(len(points), max(40_000, _POINTS_PER_CODEWORD * len(first)))
        sample = torch.randperm(len(points), generator=generator)[:n_points].to(points.device)
        weights = emphasis[sample % len(emphasis)]
        if kept is None:
            return kmeans(points[sample], weights, first.clone(), self.kmeans_iterations)
        places, rounds = kept.reshape(-1, self.dim)[sample], _RANDOM_START * self.kmeans_iterations
        return sparse_kmeans(points[sample], places, weights, len(first), rounds, generator)

    def _assign(
        self, weight: Tensor, hessian: Tensor, scales: Tensor, table: Tensor, kept: Tensor | None, order: Tensor,
        counts: tuple[int, ...], group: int,
    ) -> Tensor:  # fmt: skip
        """Codes (rows, columns / dim) in the matrix's row order, chosen with error feedback, or without (factor 1)."""
        codes = weight.new_empty(len(weight), weight.shape[1] // self.dim, dtype=torch.long)

        def quantise(begin: int, current: Tensor, factor: Tensor) -> Tensor:
            scale = scales[:, begin // group].unsqueeze(1).clamp_min(1e-12)
            inverse = torch.linalg.inv(factor)
            target = (current[:, : self.dim] / scale) @ inverse
            values = weight.new_empty(len(weight), self.dim)
            for rows, codewords in _books(order, counts, table):
                if kept is None:
                    code = nearest(target[rows], codewords @ inverse)
                else:
                    places = kept[rows, begin : begin + self.dim]
                    code = nearest_within(target[rows], places, codewords @ inverse, codewords != 0)
                codes[rows, begin // self.dim] = code
                values[rows] = codewords[code]
            return values * scale

        buffer = self.dim * max(1, 64 // self.dim)
        factor = inverse_factor(hessian, self.damping) if self.feedback else torch.eye(len(hessian)).to(hessian.device)
        error_feedback(weight, factor, self.dim, quantise, buffer)
        return codes

    def _descend(
        self, weight: Tensor, hessian: Tensor, codes: Tensor, scales: Scales, table: Tensor, kept: Tensor | None,
        order: Tensor, counts: tuple[int, ...],
    ) -> Scales:  # fmt: skip
        """Moves `codes`, in place, and the scales to a lower output error in turns; returns the scales."""
        hessian = damped(hessian, self.damping)
        values, row = scales.values.clone(), None if scales.row is None else scales.row.clone()
        for rows, codewords in _books(order, counts, table):
            for part in torch.arange(len(weight), device=weight.device)[rows].split(_ROWS):
                places = None if kept is None else kept[part]
                own = Scales(values[part], None if row is None else row[part])
                for _ in range(self.descent_rounds):
                    own = rescaled(weight[part], hessian, codes[part], own, codewords, self.scale_bits)
                    size = own.decode().clamp_min(1e-12)
                    codes[part] = best_codes(weight[part], hessian, codes[part], size, codewords, places)
                values[part] = own.values
                if row is not None and own.row is not None:
                    row[part] = own.row
        return Scales(values, row)


def _books(order: Tensor, counts: tuple[int, ...], table: Tensor) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """Rows and codewords of each codebook."""
    if len(counts) == 1:
        yield slice(None), table[0]
        return
    yield from zip(order.split(counts), table, strict=True)
