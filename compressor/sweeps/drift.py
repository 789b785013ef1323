"""Drift: how far a layer's inputs have moved from the original's, and the weights that make up for it.

A layer that is encoded on the inputs x̂ of the compressed prefix, to give what its weights W give on x̂, keeps what went
wrong before it. What it should give is W·x, x the original's inputs. The weights that come closest to that on x̂ are
W + W·C·H⁻¹, with C = E[(x − x̂)·x̂ᵀ] and H = E[x̂·x̂ᵀ]; a share of that step, with H damped, does not follow the text at
hand too far (QEP: Arai & Ichikawa, arXiv 2504.09629). Memory: one block of the original and its hidden states;
what reaches its layers lies in files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.core.batch import Batch
from compressor.graph.blocks import layers, on_input, unfolded_pieces
from compressor.ops.gram import damped
from compressor.plan.recipe import Calibration
from compressor.plan.workload import UNFOLDED_AT_ONCE
from compressor.sweeps.held import Held
from compressor.sweeps.network import Arguments, Network, Stop

ROWS_PER_COLUMN = 6
"""Inputs that there are to be of a layer for each of its columns; with fewer the step is shorter by as much."""


Beside = tuple[Network, nn.Module, list[Arguments]]
"""The original, one of its blocks, loaded, and with what each batch reaches it."""


class Drift:
    """Gathers C of the layers of a block that share an input, while the compressed block is run.

    network, block, reached    the original: its block, and with what each batch reaches it
    prefix                     before the names of its layers
    folder                     for what reaches them
    """

    def __init__(
        self, network: Network, block: nn.Module, reached: list[Arguments], prefix: str, settings: Calibration,
        folder: Path,
    ) -> None:  # fmt: skip
        self._network, self._block, self._reached = network, block, reached
        self._found = layers(block, prefix)
        self._settings, self._held = settings, Held(network, block, reached, folder)
        self._pieces: Iterator[Tensor] = iter(())
        self._sums: dict[str, Tensor] = {}
        self._apart = False

    def begin(self, names: Sequence[str]) -> None:
        """Before another group of layers; `names` as for `Held.advance`."""
        self._held.advance([self._found[name] for name in names])

    def forget(self) -> None:
        """What was gathered is done with."""
        self._sums, self._pieces, self._apart = {}, iter(()), False

    @property
    def passes(self) -> bool:
        """As `Held.passes`."""
        return self._held.passes

    def distrust(self) -> None:
        """As `Held.distrust`."""
        self._held.distrust()

    def is_number(self) -> bool:
        """Whether what was gathered is."""
        return not any(bool(total.isnan().any()) for total in self._sums.values())

    def settle(self) -> None:
        """All layers have been looked at."""
        self._held.settle()

    @torch.no_grad()
    def batch(self, i: int, lead: str, calls: int) -> None:
        """Runs the original on batch `i`, up to the last of so many `calls` that layers make on `lead`'s input."""
        layer, pieces = self._found[lead], list[Tensor]()

        def watch(given: Tensor) -> None:
            self._held.note(given)
            pieces.append(given)
            if len(pieces) == calls:
                raise Stop

        with on_input(layer, watch), self._held.begun(i), contextlib.suppress(Stop):
            self._network.step(self._block, self._reached[i])
        self._pieces = (rows for piece in pieces for rows in unfolded_pieces(layer, piece, UNFOLDED_AT_ONCE))

    def next_rows(self, beside: Tensor) -> Tensor | None:
        """The original's inputs (n, in) beside those of the compressed layer; None where they are of other tokens."""
        found = next(self._pieces, None)
        self._apart |= found is None or found.shape != beside.shape
        return None if self._apart else found

    def add(self, name: str, original: Tensor, rows: Tensor, importance: Tensor | None) -> None:
        """Adds Σ t·(x − x̂)·x̂ᵀ of some rows (n, in); `importance` t is (n,), or 1."""
        moved = original - rows
        if importance is not None:
            moved.mul_(importance.unsqueeze(1))
        total = self._sums.setdefault(name, torch.zeros(rows.shape[1], rows.shape[1], device=rows.device))
        total.addmm_(moved.T, rows)

    def corrected(self, name: str, matrix: Tensor, moment: Tensor, n_rows: int, last: bool = False) -> Tensor:
        """The weights (out, in) whose outputs come nearer to the original's than those of `matrix` do.

        moment   H (in, in), the mean over `n_rows`
        last     whether no other layer is corrected by what was gathered
        """
        total = self._sums.get(name, next(iter(self._sums.values()), None))
        if total is None or not n_rows or self._apart:
            return matrix
        settings, columns = self._settings, matrix.shape[1]
        share = settings.drift * min(1.0, n_rows / (ROWS_PER_COLUMN * columns))
        outputs = matrix @ total
        if last:
            del total
            self.forget()  # before the factor, which is as large
        factor = damped(moment, settings.drift_damping).T  # column by column, as LAPACK wants it
        failed = moment.new_zeros((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))  # in place: it is large
        if failed:
            return matrix
        step = torch.cholesky_solve(outputs.T, factor).T
        return matrix.add(step, alpha=share / n_rows)


def blocks_beside(network: Network, batches: list[Batch]) -> Iterator[Beside]:
    """The original's blocks one after the other, loaded, with what reaches them."""
    original = Network(network.checkpoint, network.fast, network.device)
    for _, block, reached in original.sweep(batches):
        yield original, block, reached
