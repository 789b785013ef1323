"""Encoded matrices that gradient steps improve: scales, codewords, and the codes themselves.

A learnable stands for one encoded matrix: its forward decodes, its backward gives the gradients of what is continuous,
and of a codebook gathers what the codes would gain by moving (the proximal search of JLCM, arXiv 2309.17361).
Codewords are rounded to the int4 grid straight-through. Held is what learns; codes that stay are read when they are
due, forwards and again backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.contract import Learnable
from compressor.core.encoding import Codebook, Encoding, Refined, Scaled, Scales
from compressor.core.errors import PassError
from compressor.core.passes import Moves, Rates
from compressor.ops.sums import mean

Kind = TypeVar("Kind", bound=Encoding)
_AT_ONCE = 1 << 18
"""Codes that look for a better codeword."""
_ROWS = 4096
"""Of a table, as floats at a time."""


def learnable(
    encoding: Encoding, moves: Moves, keeps_zeros: bool = False, again: Callable[[], Encoding] | None = None
) -> Learnable:  # fmt: skip
    """An encoded matrix, open to learning; `keeps_zeros` where a pass has dropped weights of it.

    `again` reads the encoding anew, which then is not held.

    Raises:
        PassError: Nothing learns of such an encoding, though its spec says so.
    """
    if isinstance(encoding, Codebook):
        return LearnedCodebook(encoding, moves, keeps_zeros, again)
    if isinstance(encoding, Scaled):
        return LearnedScales(encoding, again)
    if isinstance(encoding, Refined):
        return LearnedTable(encoding, again)
    raise PassError(f"encoding '{encoding.kind}' has nothing that gradient steps learn; its spec must not say so")


def _scale_group(scales: Tensor, rates: Rates) -> dict:
    return {"params": [scales], "lr": rates.scale * float(mean(scales.detach().abs()))}


def _stored(scales: Tensor, like: Scales) -> Scales:
    learned = scales.detach()
    return Scales.of(learned) if like.row is None else Scales.of(learned.clamp_min(1e-8), 8)


def _pieces(n_rows: int) -> Iterator[slice]:
    """Rows of a table that are floats at a time."""
    return (slice(start, min(start + _ROWS, n_rows)) for start in range(0, n_rows, _ROWS))


def _decoded(encoding: Scaled, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with other scales, rounded to `dtype`."""
    matrix = torch.empty(encoding.shape, dtype=dtype, device=scales.device)
    every = scales.expand(encoding.shape[0], -1).unsqueeze(2)
    for rows in _pieces(encoding.shape[0]):
        matrix[rows] = (encoding.levels(rows) * every[rows]).flatten(1)[:, : encoding.shape[1]]
    return matrix


def _to_scales(encoding: Scaled, upstream: Tensor) -> Tensor:
    """The gradient of the scales (rows, n_groups) by that of the matrix."""
    found = []
    for rows in _pieces(encoding.shape[0]):
        levels = encoding.levels(rows)
        part = upstream[rows].float()
        padding = levels.shape[1] * levels.shape[2] - part.shape[1]
        part = functional.pad(part, (0, padding)) if padding else part
        found.append((levels * part.view(levels.shape)).sum(2))
    return torch.cat(found)


class _Read(Learnable, Generic[Kind]):
    """What learns of an encoding of one kind; with `again`, which reads it anew, it is not held."""

    kind: type[Kind]

    def __init__(self, encoding: Kind, again: Callable[[], Encoding] | None) -> None:
        super().__init__()
        self._read = again or (lambda: encoding)

    @property
    def encoding(self) -> Kind:
        """As it was at the start."""
        found = self._read()
        assert isinstance(found, self.kind)
        return found


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales: Tensor, learned: LearnedScales, dtype: torch.dtype) -> Tensor:
        ctx.learned, ctx.shape = learned, scales.shape
        return _decoded(learned.encoding, scales, dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _to_scales(ctx.learned.encoding, upstream).sum_to_size(ctx.shape), None, None


class LearnedScales(_Read[Scaled]):
    """The scales (rows, n_groups) of a matrix whose codes stay."""

    kind = Scaled

    def __init__(self, encoding: Scaled, again: Callable[[], Encoding] | None = None) -> None:
        super().__init__(encoding, again)
        self.scales = nn.Parameter(encoding.scales.decode())

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _Scale.apply(self.scales, self, dtype)  # pyright: ignore[reportReturnType]

    def parameter_groups(self, rates: Rates) -> list[dict]:
        return [_scale_group(self.scales, rates)]

    def result(self) -> Scaled:
        old = self.encoding
        return dataclasses.replace(old, scales=_stored(self.scales, old.scales))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, scales: Tensor, learned: LearnedCodebook) -> Tensor:
        index = learned.index
        values = learned.values(table.detach(), index).view(*scales.shape, -1)
        ctx.save_for_backward(scales, values, index)
        ctx.learned, ctx.size = learned, table.shape
        return (values * scales.unsqueeze(2)).flatten(1)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        scales, values, index = ctx.saved_tensors
        upstream = upstream.float().reshape(values.shape)
        to_scales = (upstream * values).sum(2)
        to_values = (upstream * scales.unsqueeze(2)).reshape(-1, ctx.size[1])
        index = index.long()  # torch adds by int32 fifteen times slower
        to_table = torch.zeros(ctx.size, device=index.device).index_add_(0, index, to_values)
        ctx.learned.gather(to_values)
        return to_table, to_scales, None


class LearnedCodebook(_Read[Codebook]):
    """The scales, codewords and codes of a matrix.

    table (n_codebooks·2**width, dim) in steps of the int4 grid, scales (rows, n_groups), index (rows·vectors,) into the
    table. A rate of 0 in `moves` leaves the codes alone; so does `keeps_zeros`, for a pruned matrix, with which a zero
    in a codeword stays one. Of codes that move the index is held.
    """

    kind = Codebook

    def __init__(
        self, encoding: Codebook, moves: Moves, keeps_zeros: bool = False, again: Callable[[], Encoding] | None = None
    ) -> None:  # fmt: skip
        super().__init__(encoding, again)
        self._moves = Moves() if keeps_zeros or encoding.window is not None else moves
        self._index = encoding.index().flatten() if self._moves.rate else None
        self._n_codes = encoding.shape[0] * encoding.codes.shape[1]
        self._columns, self._order = encoding.shape[1], encoding.order
        self._n_books, self._on_int4_grid = len(encoding.counts), encoding.on_int4_grid
        self.table = nn.Parameter(encoding.table.float().flatten(0, 1))
        if keeps_zeros:
            open_places = self.table.detach() != 0
            self.table.register_hook(lambda gradient: gradient * open_places)
        self.scales = nn.Parameter(encoding.scales.decode())
        self._gathered: Tensor | None = None
        self._n_moved = 0

    @property
    def index(self) -> Tensor:
        """The codeword of each vector, as it is now."""
        return self.encoding.index().flatten() if self._index is None else self._index

    def values(self, table: Tensor, index: Tensor) -> Tensor:
        """The matrix without its scales, flat, in a small type that holds it exactly."""
        grid = self.grid(table)
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(table.shape[1])
        if whole is None or not self._on_int4_grid:
            return grid[index].flatten()
        return grid.to(torch.int8).view(whole).flatten()[index].view(torch.int8)  # a codeword in one piece

    def grid(self, table: Tensor) -> Tensor:
        """The table as it will be stored: codewords on the int4 grid, where they are not free."""
        return table.round().clamp(-8, 7) if self._on_int4_grid else table

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (rows, columns) in its own row order."""
        stored: Tensor = _Decode.apply(self.table, self.scales, self)[:, : self._columns]  # pyright: ignore
        if self._order is not None:
            stored = torch.zeros_like(stored).index_copy(0, self._order.long(), stored)
        return stored.to(dtype)

    @property
    def n_codes(self) -> int:
        return self._n_codes

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
            self._gathered = torch.zeros_like(gradient, dtype=torch.bfloat16)
        self._gathered.add_(gradient, alpha=-self._moves.rate / float(size))

    @torch.no_grad()
    def move(self) -> None:
        """Moves each code to the near codeword whose logit has overtaken the current one's.

        Logit of codeword k: ⟨Σ −g, (C_k − c)/‖C_k − c‖⟩ · 1/(‖C_k − c‖ + δ) − 1, of the current one 0. In one dimension
        this is the summed `proximal_gradient` of the jlcm pass, distances in eighths of the grid.
        """
        if self._gathered is None or self._index is None:
            return
        candidates, pull = self._neighbours()
        for start in range(0, len(self._index), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            current = self._index[part]
            logits = torch.einsum("vkd,vd->vk", pull[current], self._gathered[part].float()) - 1
            best = logits.max(1)
            rows = (best.values > 0).nonzero().flatten()
            self._index[part][rows] = candidates[current[rows], best.indices[rows]].int()
            self._gathered[part][rows] = 0
            self._n_moved += len(rows)

    def _neighbours(self) -> tuple[Tensor, Tensor]:
        """Per codeword its nearest others (n, k), and how a move to each is pulled: (C_k − c)/‖·‖ · 1/(‖·‖/8 + δ)."""
        flat = self.grid(self.table)
        grid = flat.view(self._n_books, -1, flat.shape[1])
        size = grid.shape[1]
        distance = torch.cdist(grid, grid)
        distance.masked_fill_(distance == 0, torch.inf)
        near = distance.topk(min(self._moves.neighbours, size - 1), largest=False)
        offset = (torch.arange(self._n_books, device=flat.device) * size).view(-1, 1, 1)
        candidates = (near.indices + offset).flatten(0, 1)
        reach = near.values.flatten(0, 1).unsqueeze(2)
        pull = (flat[candidates] - flat.unsqueeze(1)) / reach / (reach / 8 + self._moves.delta)
        return candidates, pull.nan_to_num(0.0)

    def result(self) -> Codebook:
        old = self.encoding
        table = self.grid(self.table.detach()).to(old.table.dtype).view(old.table.shape)
        codes = old.codes
        if self._index is not None:
            codes = (self._index % old.table.shape[1]).view(old.codes.shape).int()
        return dataclasses.replace(old, codes=codes, table=table, scales=_stored(self.scales, old.scales))


class _Refine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inner: Tensor, extra: Tensor, learned: LearnedTable, dtype: torch.dtype) -> Tensor:
        encoding, ctx.learned = learned.encoding, learned
        matrix, rows = _decoded(encoding.inner, inner, dtype), encoding.rows.long()
        some = (encoding.inner.levels(rows) * inner[rows].unsqueeze(2)).flatten(1)[:, : matrix.shape[1]]
        matrix[rows] = (some + _decoded(encoding.extra, extra, torch.float32)).to(dtype)
        return matrix

    @staticmethod
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        encoding: Refined = ctx.learned.encoding
        to_extra = _to_scales(encoding.extra, upstream[encoding.rows.long()])
        return _to_scales(encoding.inner, upstream), to_extra, None, None


class LearnedTable(_Read[Refined]):
    """A refined table, both of whose grids learn."""

    kind = Refined

    def __init__(self, encoding: Refined, again: Callable[[], Encoding] | None = None) -> None:
        super().__init__(encoding, again)
        self.inner, self.extra = (nn.Parameter(half.scales.decode()) for half in (encoding.inner, encoding.extra))

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _Refine.apply(self.inner, self.extra, self, dtype)  # pyright: ignore[reportReturnType]

    def parameter_groups(self, rates: Rates) -> list[dict]:
        return [_scale_group(self.inner, rates), _scale_group(self.extra, rates)]

    def result(self) -> Refined:
        old = self.encoding
        inner, extra = (
            dataclasses.replace(half, scales=_stored(scales, half.scales))
            for half, scales in ((old.inner, self.inner), (old.extra, self.extra))
        )
        return dataclasses.replace(old, inner=inner, extra=extra)
