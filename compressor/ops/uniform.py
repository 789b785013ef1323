"""A grid for each group of columns of a matrix, fitted with or without error feedback, as it will be stored.

Uniform, ŵ = s·(q − z), or of a few levels of the int4 grid, ŵ = s·C_q. With error feedback the scale of a uniform group
is searched when its first column is due, weighted by what the columns cost (GPTQ, Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compressor.ops.compiled import compiled, on_host, over_rows
from compressor.ops.error_feedback import BUFFER, error_feedback, feed_forward
from compressor.ops.grids import KINDS, best_grid, code, search_scale, shares
from compressor.ops.vector_quantization import kmeans

HEADROOM = 1.25
"""Of a row's 8-bit scales: errors that are fed forward may let a group grow."""
LEAST_SCALE = 6.2e-5
"""Of float16 without loss of precision."""

_POINTS, _ITERATIONS = 40_000, 8

Refine = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fitted:
    """A matrix (rows, columns padded to whole groups) on its grid.

    codes   uint8                  due   what was rounded to them: the weight, with errors fed forward
    scale   (rows, n_groups)       zero  (rows, n_groups)
    top     (rows, 1) float16, the largest scale that 8 bits can hold: s = top·byte/255
    levels  (K,) ascending, what codes stand for, in steps of the scale; None: each stands for itself, 0 … K − 1
    """

    codes: Tensor
    due: Tensor
    scale: Tensor
    zero: Tensor
    top: Tensor
    n_levels: int
    levels: Tensor | None = None

    @property
    def group(self) -> int:
        return self.due.shape[1] // self.scale.shape[1]

    def neighbours(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The level below a position and the gap to the next one; beyond the grid those of its outermost two."""
        if self.levels is None:
            return position.floor().clamp(0, self.n_levels - 2), torch.ones_like(position)
        index = (torch.searchsorted(self.levels, position, right=True) - 1).clamp(0, self.n_levels - 2)
        return self.levels[index], self.levels[index + 1] - self.levels[index]

    def code_of(self, values: Tensor) -> Tensor:
        """Codes, uint8, of values that are levels."""
        found = values if self.levels is None else torch.searchsorted(self.levels, values.contiguous())
        return found.to(torch.uint8)

    def nearest(self, position: Tensor) -> Tensor:
        """The level nearest to a position."""
        if self.levels is None:
            return position.round().clamp(0, self.n_levels - 1)
        return _nearest(position, self.levels)

    def clamp(self, position: Tensor) -> Tensor:
        """Within the grid."""
        if self.levels is None:
            return position.clamp(0, self.n_levels - 1)
        return position.clamp(float(self.levels[0]), float(self.levels[-1]))


def stored_scale(scale: Tensor, top: Tensor | None, bits: int) -> Tensor:
    """Scales (rows, n_groups) as they are stored: float16, or in 8 bits as shares of `top` (rows, 1)."""
    if bits == 16:
        return torch.where(scale.abs() < LEAST_SCALE, LEAST_SCALE, scale).half().float()
    if top is None:
        return scale
    step = top.float() / 255
    return (scale / step).round().clamp(1, 255) * step


@compiled
def nearest_stored(scale, step, bits):  # pragma: no cover - compiled
    """As `stored_scale`, of one; `step` is a 255th of its row's top."""
    if bits == 8:
        return min(max(np.rint(scale / step), np.float32(1)), np.float32(255)) * step
    shown = np.float32(LEAST_SCALE if abs(scale) < LEAST_SCALE else scale)
    number = np.int64(shown.view(np.int32))
    return np.int32((number + 0xFFF + (number >> 13 & 1)) & ~0x1FFF).view(np.float32)  # of 24 bits of a mantissa 11


@compiled
def _feed(
    current, local, chosen, errors, due, scales, zeros, emphasis, kept, steps, tried, kind, bits, scale_bits, begin,
    first, last,
):  # pragma: no cover - compiled  # fmt: skip
    """Error feedback within a block of columns, of rows first … last: fills chosen, errors, due, scales and zeros."""
    n_columns, size = current.shape[1], emphasis.shape[1]
    top, none = np.float32((1 << bits) - 1), np.float32(0)
    now, group = np.empty(n_columns, np.float32), np.empty(size, np.float32)
    for row in range(first, last):
        for k in range(n_columns):
            now[k] = current[row, k]
        for j in range(n_columns):
            column = begin + j
            at = column // size
            if column % size == 0:
                for k in range(size):
                    group[k] = now[j + k]
                found, zeros[row, at] = best_grid(group, emphasis[at], tried, kind, bits, scale_bits == 16)
                scales[row, at] = nearest_stored(found, steps[row], scale_bits)
            scale, zero = scales[row, at], zeros[row, at]
            due[row, column] = now[j]
            value = (min(max(np.rint(now[j] / scale + zero), none), top) - zero) * scale
            if column < kept.shape[1] and not kept[row, column]:
                value = none
            error = (now[j] - value) / local[j, j]
            chosen[row, j], errors[row, j] = value, error
            for k in range(n_columns):
                now[k] -= error * local[j, k]


@dataclass(frozen=True)
class Grid:
    """How a matrix is put on a uniform grid; `refine` (groups, scale, zero) → zero changes learned zero points."""

    bits: int
    group: int
    zero: str
    scale_bits: int
    refine: Refine | None = None

    def fit(self, weight: Tensor, mask: Tensor | None = None, factor: Tensor | None = None) -> Fitted:
        """Of a matrix (rows, columns), with error feedback where its `factor` is given (`inverse_factor`, padded).

        Where `mask` (rows, columns) is False the value is 0. Rows know nothing of one another.
        """
        n_rows = len(weight)
        weight = functional.pad(weight.float(), (0, -weight.shape[1] % self.group))
        groups = weight.view(n_rows, -1, self.group)
        scale, zero = self._choose(groups, 1.0, None)
        room = HEADROOM if factor is not None else 1.0
        top = (scale.abs().amax(1, keepdim=True) * room).clamp_min(1e-6).half()
        chosen = due = weight
        if factor is not None:  # every group's grid is searched again when it is due
            chosen, due = self._feed_forward(weight, mask, factor, scale, zero, top)
        else:
            scale = stored_scale(scale, top, self.scale_bits)
        codes = code(chosen.view(n_rows, -1, self.group), scale.unsqueeze(2), zero.unsqueeze(2), self.bits)
        return Fitted(codes.flatten(1).to(torch.uint8), due, scale, zero, top, 2**self.bits)

    def _feed_forward(
        self, weight: Tensor, mask: Tensor | None, factor: Tensor, scale: Tensor, zero: Tensor, top: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values on the grid and what was rounded to them; fills `scale` and `zero` on the way."""
        due, chosen_scale, chosen_zero = torch.empty(weight.shape), scale.cpu(), zero.cpu()
        whole = due.numpy(), chosen_scale.numpy(), chosen_zero.numpy()
        emphasis, steps = on_host(factor.diagonal().pow(-2).view(-1, self.group), top.float().squeeze(1) / 255)
        (kept,) = on_host(torch.ones(0, 0, dtype=torch.bool) if mask is None else mask)
        how = emphasis, kept, steps, shares(self.bits), KINDS.index(self.zero), self.bits, self.scale_bits

        def visit(begin: int, current: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
            chosen, errors = (torch.empty(current.shape) for _ in range(2))
            block = *on_host(current, local), chosen.numpy(), errors.numpy()
            over_rows(len(weight), lambda here: _feed(*block, *whole, *how, begin, here.start, here.stop))
            return chosen.to(weight.device), errors.to(weight.device)

        chosen = feed_forward(weight, factor, self.group * max(1, BUFFER // self.group), visit)
        scale.copy_(chosen_scale)
        zero.copy_(chosen_zero)
        return chosen, due.to(weight.device)

    def _choose(self, groups: Tensor, emphasis: Tensor | float, top: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scales and zeros (rows, n_groups); scales as they are stored."""
        scale, zero = search_scale(groups, self.bits, self.zero, emphasis, signed=self.scale_bits == 16)
        if self.refine is not None:
            zero = self.refine(groups, scale, zero)
        return stored_scale(scale.squeeze(-1), top, self.scale_bits), zero.squeeze(-1)


@dataclass(frozen=True)
class LevelGrid:
    """How a matrix is put on 2**bits levels of the int4 grid −8 … 7, the same for all of it, and a scale per group."""

    bits: int
    group: int
    scale_bits: int

    def fit(
        self, weight: Tensor, emphasis: Tensor, mask: Tensor | None = None, factor: Tensor | None = None
    ) -> Fitted:  # fmt: skip
        """Levels by k-means of w/s weighted by `emphasis` (columns,); then codes, as `Grid.fit` has them.

        With a `mask`, zero is one of the levels.
        """
        n_rows, n_columns = weight.shape
        padding = -n_columns % self.group
        weight = functional.pad(weight.float(), (0, padding))
        emphasis = functional.pad(emphasis, (0, padding))
        groups, weights = weight.view(n_rows, -1, self.group), emphasis.view(1, -1, self.group)
        scale = groups.abs().amax(2) / 7.5
        room = HEADROOM if factor is not None else 1.0
        top = (scale.amax(1, keepdim=True) * room).clamp_min(1e-6).half()
        levels = torch.empty(0)  # from the first round on
        for _ in range(2):
            scale = stored_scale(scale.clamp_min(LEAST_SCALE), top, self.scale_bits)
            levels = self._levels((groups / scale.unsqueeze(2)).flatten(1)[:, :n_columns], emphasis[:n_columns], mask)
            scale = self._search(groups, weights, levels)
        scale = stored_scale(scale, top, self.scale_bits)
        due, chosen = weight, _nearest(groups / scale.unsqueeze(2), levels).flatten(1)
        if factor is not None:
            due, chosen = torch.empty_like(weight), torch.empty_like(weight)

            def quantise(begin: int, current: Tensor, _: Tensor) -> Tensor:
                s = scale[:, begin // self.group].unsqueeze(1)
                due[:, begin : begin + 1] = current[:, :1]
                values = _nearest(current[:, :1] / s, levels)
                if mask is not None and begin < n_columns:
                    values = values * mask[:, begin : begin + 1]
                chosen[:, begin : begin + 1] = values
                return values * s

            error_feedback(weight, factor, 1, quantise)
        codes = torch.searchsorted(levels, chosen).to(torch.uint8)
        return Fitted(codes, due, scale, torch.zeros_like(scale), top, 2**self.bits, levels)

    def _levels(self, points: Tensor, emphasis: Tensor, mask: Tensor | None) -> Tensor:
        """(K,) ascending and distinct."""
        stride = max(1, points.numel() // _POINTS)
        values = points.flatten()[::stride]
        weights = emphasis.repeat(len(points))[::stride].clamp_min(1e-12)
        first = torch.quantile(values, (torch.arange(2**self.bits, device=values.device) + 0.5) / 2**self.bits)
        means = kmeans(values.unsqueeze(1), weights, first.unsqueeze(1), _ITERATIONS).flatten()
        free = torch.arange(-8.0, 8.0)
        found = [0.0] if mask is not None else []
        for mean in means[means.abs().argsort(stable=True)].tolist()[len(found) :]:
            open_levels = free[~torch.isin(free, torch.tensor(found))]
            found.append(float(open_levels[(open_levels - mean).abs().argmin()]))
        return torch.tensor(sorted(found), device=points.device)

    def _search(self, groups: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
        """Scales (rows, n_groups) with the least weighted error among shares of the group's largest weight."""
        largest = groups.abs().amax(2, keepdim=True).clamp_min(LEAST_SCALE)

        def lost(scale: Tensor) -> Tensor:
            return (weights * (_nearest(groups / scale, levels) * scale - groups) ** 2).sum(2, keepdim=True)

        shares = torch.linspace(0.05, 0.3, 26)
        best_scale = largest * shares[0]
        best = lost(best_scale)
        for share in shares[1:]:
            scale = largest * share
            error = lost(scale)
            better = error < best
            best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
        return best_scale.squeeze(2)


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The level nearest to each value; ties to the upper."""
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[torch.searchsorted(middles, values.contiguous(), right=True)]
