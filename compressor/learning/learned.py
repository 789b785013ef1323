"""Encoded matrices that gradient steps improve: scales, codewords, and the codes themselves.

A learnable stands for one encoded matrix: its forward decodes, its backward gives the gradients of what is continuous,
and of a codebook gathers what the codes would gain by moving (the proximal search of JLCM, arXiv 2309.17361).
Codewords are rounded to the int4 grid straight-through.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from compressor.core.contract import Learnable
from compressor.core.encoding import Codebook, Encoding, Refined, Scaled, Scales
from compressor.core.errors import PassError
from compressor.core.passes import Moves, Rates
from compressor.ops.sums import mean

_AT_ONCE = 1 << 18
"""Codes that look for a better codeword."""


def learnable(encoding: Encoding, moves: Moves, keeps_zeros: bool = False) -> Learnable:
    """An encoded matrix, open to learning; `keeps_zeros` where a pass has dropped weights of it.

    Raises:
        PassError: Nothing learns of such an encoding, though its spec says so.
    """
    if isinstance(encoding, Codebook):
        return LearnedCodebook(encoding, moves, keeps_zeros)
    if isinstance(encoding, Scaled):
        return LearnedScales(encoding)
    if isinstance(encoding, Refined):
        return LearnedTable(encoding)
    raise PassError(f"encoding '{encoding.kind}' has nothing that gradient steps learn; its spec must not say so")


def _scale_group(scales: Tensor, rates: Rates) -> dict:
    return {"params": [scales], "lr": rates.scale * float(mean(scales.detach().abs()))}


def _stored(scales: Tensor, like: Scales) -> Scales:
    learned = scales.detach()
    return Scales.of(learned) if like.row is None else Scales.of(learned.clamp_min(1e-8), 8)


class LearnedScales(Learnable):
    """The scales (rows, n_groups) of a matrix whose codes stay."""

    def __init__(self, encoding: Scaled) -> None:
        super().__init__()
        self.encoding = encoding
        values = encoding.levels()
        whole = bool((values == values.round()).all())
        self._values = values.to(torch.int16 if whole else torch.bfloat16)  # small types that hold them exactly
        self.scales = nn.Parameter(encoding.scales.decode())

    def forward(self) -> Tensor:
        return (self._values * self.scales.unsqueeze(2)).flatten(1)[:, : self.encoding.shape[1]]

    def parameter_groups(self, rates: Rates) -> list[dict]:
        return [_scale_group(self.scales, rates)]

    def result(self) -> Scaled:
        return dataclasses.replace(self.encoding, scales=_stored(self.scales, self.encoding.scales))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, scales: Tensor, learned: LearnedCodebook) -> Tensor:
        values = learned.values(table.detach()).view(*scales.shape, -1)
        ctx.save_for_backward(scales, values)
        ctx.learned = learned
        return (values * scales.unsqueeze(2)).flatten(1)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        scales, values = ctx.saved_tensors
        learned = ctx.learned
        upstream = upstream.float().reshape(values.shape)
        to_scales = (upstream * values).sum(2)
        to_values = (upstream * scales.unsqueeze(2)).reshape(-1, learned.encoding.dim)
        index = learned.index.long()  # torch adds by int32 fifteen times slower
        to_table = torch.zeros(learned.table.shape).index_add_(0, index, to_values)
        learned.gather(to_values)
        return to_table, to_scales, None


class LearnedCodebook(Learnable):
    """The scales, codewords and codes of a matrix.

    table (n_codebooks·2**width, dim) in steps of the int4 grid, scales (rows, n_groups), index (rows·vectors,) into the
    table. A rate of 0 in `moves` leaves the codes alone; so does `keeps_zeros`, for a pruned matrix, with which a zero
    in a codeword stays one.
    """

    def __init__(self, encoding: Codebook, moves: Moves, keeps_zeros: bool = False) -> None:
        super().__init__()
        self.encoding = encoding
        self._moves = Moves() if keeps_zeros or encoding.window is not None else moves
        self.index = encoding.index().flatten()
        self.table = nn.Parameter(encoding.table.float().flatten(0, 1))
        if keeps_zeros:
            open_places = self.table.detach() != 0
            self.table.register_hook(lambda gradient: gradient * open_places)
        self.scales = nn.Parameter(encoding.scales.decode())
        self._gathered: Tensor | None = None
        self._n_moved = 0

    def values(self, table: Tensor) -> Tensor:
        """The matrix without its scales, flat, in a small type that holds it exactly."""
        grid = self.grid(table)
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(self.encoding.dim)
        if whole is None or not self.encoding.on_int4_grid:
            return grid[self.index].flatten()
        return grid.to(torch.int8).view(whole).flatten()[self.index].view(torch.int8)  # a codeword in one piece

    def grid(self, table: Tensor) -> Tensor:
        """The table as it will be stored: codewords on the int4 grid, where they are not free."""
        return table.round().clamp(-8, 7) if self.encoding.on_int4_grid else table

    def forward(self) -> Tensor:
        """The matrix (rows, columns) in its own row order."""
        stored = _Decode.apply(self.table, self.scales, self)[:, : self.encoding.shape[1]]
        order = self.encoding.order
        return stored if order is None else torch.zeros_like(stored).index_copy(0, order.long(), stored)

    @property
    def n_codes(self) -> int:
        return len(self.index)

    @property
    def flipped(self) -> int:
        return self._n_moved

    def parameter_groups(self, rates: Rates) -> list[dict]:
        return [{"params": [self.table], "lr": rates.codebook}, _scale_group(self.scales, rates)]

    def gather(self, gradient: Tensor) -> None:
        """Adds a step's gradient of the values, scaled to unit root mean square, to what codes will move by."""
        if not self._moves.rate:
            return
        size = mean(gradient.pow(2)).sqrt().clamp_min(1e-30)
        if self._gathered is None:
            self._gathered = torch.zeros(gradient.shape, dtype=torch.bfloat16)
        self._gathered.add_(gradient, alpha=-self._moves.rate / float(size))

    @torch.no_grad()
    def move(self) -> None:
        """Moves each code to the near codeword whose logit has overtaken the current one's.

        Logit of codeword k: ⟨Σ −g, (C_k − c)/‖C_k − c‖⟩ · 1/(‖C_k − c‖ + δ) − 1, of the current one 0. In one dimension
        this is the summed `proximal_gradient` of the jlcm pass, distances in eighths of the grid.
        """
        if self._gathered is None:
            return
        candidates, pull = self._neighbours()
        for start in range(0, len(self.index), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            current = self.index[part]
            logits = torch.einsum("vkd,vd->vk", pull[current], self._gathered[part].float()) - 1
            best = logits.max(1)
            rows = (best.values > 0).nonzero().flatten()
            self.index[part][rows] = candidates[current[rows], best.indices[rows]].int()
            self._gathered[part][rows] = 0
            self._n_moved += len(rows)

    def _neighbours(self) -> tuple[Tensor, Tensor]:
        """Per codeword its nearest others (n, k), and how a move to each is pulled: (C_k − c)/‖·‖ · 1/(‖·‖/8 + δ)."""
        n_books, size = len(self.encoding.counts), self.encoding.table.shape[1]
        flat = self.grid(self.table)
        grid = flat.view(n_books, size, self.encoding.dim)
        distance = torch.cdist(grid, grid)
        distance.masked_fill_(distance == 0, torch.inf)
        near = distance.topk(min(self._moves.neighbours, size - 1), largest=False)
        offset = (torch.arange(n_books) * size).view(-1, 1, 1)
        candidates = (near.indices + offset).flatten(0, 1)
        reach = near.values.flatten(0, 1).unsqueeze(2)
        pull = (flat[candidates] - flat.unsqueeze(1)) / reach / (reach / 8 + self._moves.delta)
        return candidates, pull.nan_to_num(0.0)

    def result(self) -> Codebook:
        old = self.encoding
        table = self.grid(self.table.detach()).to(old.table.dtype).view(old.table.shape)
        codes = old.codes  # a path's states do not move one by one
        if old.window is None:
            codes = (self.index % old.table.shape[1]).view(old.codes.shape).int()
        return dataclasses.replace(old, codes=codes, table=table, scales=_stored(self.scales, old.scales))


class LearnedTable(Learnable):
    """A refined table, both of whose grids learn."""

    def __init__(self, encoding: Refined) -> None:
        super().__init__()
        self.encoding = encoding
        self.inner, self.extra = LearnedScales(encoding.inner), LearnedScales(encoding.extra)

    def forward(self) -> Tensor:
        return self.inner().index_add(0, self.encoding.rows.long(), self.extra())

    def parameter_groups(self, rates: Rates) -> list[dict]:
        return [*self.inner.parameter_groups(rates), *self.extra.parameter_groups(rates)]

    def result(self) -> Refined:
        return dataclasses.replace(self.encoding, inner=self.inner.result(), extra=self.extra.result())
