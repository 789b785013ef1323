"""Trellis codes (QTIP: Tseng, Sun, Hou, De Sa, arXiv 2406.11235, NeurIPS 2024), down the rows of a matrix.

QTIP rotates weights into Gaussians and runs its trellis along blocks of 16 × 16. Here a step gives a codeword of two
neighbouring columns, on the int4 grid times the scale of a group, and the path runs down all rows of these columns: so
that error feedback goes on from column to column as ever (GPTQ, arXiv 2210.17323, in the block form of QuIP#, arXiv
2402.04396), and the path is the best one for what is due in these columns of every row at once. Without rotation: the
groups' scales see to outliers. The table is Gaussian to begin with, and learns with the network.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compressor.core.contract import Statistics, WeightPass
from compressor.core.encoding import Codebook, Scales
from compressor.core.errors import PassError
from compressor.core.spec import group_columns
from compressor.ops.error_feedback import BUFFER, feed_forward, inverse_factor
from compressor.ops.gram import damped
from compressor.ops.states import codes_of
from compressor.ops.trellis import best_path, feed_path
from compressor.ops.vector_descent import best_codes
from compressor.passes.parts.codewords import group_scales, in_whole_groups, rescaled, snap
from compressor.passes.settings.trellis import DIM, TrellisSettings

RESOLUTION = 2.6
"""Grid steps per rms at which a Gaussian table on the grid loses least, of 2 to 5.2."""


@functools.lru_cache(maxsize=8)
def gaussian_table(window: int) -> Tensor:
    """Codewords (2**window, 2) of a unit Gaussian on the int4 grid: that each is as likely as another is what a path
    chooses among."""
    generator = torch.Generator().manual_seed(0)
    return snap(torch.randn(2**window, DIM, generator=generator), RESOLUTION)


class Trellis(TrellisSettings, WeightPass):
    """Trellis codes; see the module for the method."""

    def encode(self, matrix: Tensor, known: Statistics, generator: torch.Generator) -> Codebook:
        """Of a matrix (out, in).

        Raises:
            PassError: Weights of it were dropped.
        """
        if known.kept is not None:
            raise PassError("trellis: a path cannot keep zeros where weights were dropped; write jlcm after pruning")
        rows, columns = matrix.shape
        group = group_columns(self.group, columns, DIM)
        weight, hessian = in_whole_groups(matrix, known.moment(columns), group)
        window = self.window_of((rows, columns))
        table = gaussian_table(window).to(weight.device)

        def path(points: Tensor, weights: Tensor, codewords: Tensor) -> Tensor:
            return best_path(points, weights, codewords, self.width).long()

        scales = Scales.of(group_scales(weight[:, :columns], group, RESOLUTION), self.scale_bits)
        states = self._assign(weight, hessian, scales.decode(), table, group)
        if self.descent_rounds:
            hessian = damped(hessian, self.damping)
        for _ in range(self.descent_rounds):
            scales = rescaled(weight, hessian, states, scales, table, self.scale_bits)
            size = scales.decode().clamp_min(1e-12)
            states = best_codes(weight, hessian, states, size, table, path=path)
        codes = codes_of(states, self.width, window)
        return Codebook(
            (rows, columns), self.width, DIM, group, codes, table.to(torch.int8).unsqueeze(0), scales, (rows,),
            window=window,
        )  # fmt: skip

    def _assign(
        self, weight: Tensor, hessian: Tensor, scales: Tensor, table: Tensor, group: int
    ) -> Tensor:  # fmt: skip
        """States (rows, columns / 2), chosen with error feedback."""
        found: list[Tensor] = []

        def visit(begin: int, current: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
            pairs = torch.arange(begin, begin + current.shape[1], DIM, device=scales.device)
            size = scales[:, pairs // group].clamp_min(1e-12)
            values, errors, states = feed_path(current, local, size, table, self.width)
            found.append(states)
            return values, errors

        feed_forward(weight, inverse_factor(hessian, self.damping), BUFFER, visit)
        return torch.cat(found, 1).long()
