"""What reaches the layers of a block, held in files, so that no forward computes again what gave it.

A block is run once for the inputs of each stage of its layers, and once for what it gives: each time from its beginning
on, though all that comes before the stage is as it was. So layers of earlier stages are given what reached them, where
their products are needed, as by a residual connection, and passed by with NaN of their outputs' shape where they are
not: which is tried on an example, stage by stage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.core.log import LOGGER
from compressor.graph.blocks import layout_of, patched, unfolds, weight_of
from compressor.sweeps.network import Arguments, Network, Stop, first_example, n_examples

_ROOM = 2_000_000_000
"""Bytes that are left free on the disk, for what is to stay."""


@dataclass
class _Stage:
    """Layers, and what reached them of each batch: in a file, or nowhere where there was no room for it."""

    layers: list[nn.Module]
    file: Path
    shapes: list[torch.Size] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def add(self, rows: Tensor) -> None:
        self.dtype, self.device = rows.dtype, rows.device
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("ab") as file:
            file.write(rows.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.shapes.append(rows.shape)

    def read(self, batch: int) -> Tensor:
        size, before = self.dtype.itemsize, sum(shape.numel() for shape in self.shapes[:batch])
        shape = self.shapes[batch]
        with self.file.open("rb") as file:
            file.seek(before * size)
            held = bytearray(shape.numel() * size)
            file.readinto(held)
        return torch.frombuffer(held, dtype=self.dtype).view(shape).to(self.device)


@contextlib.contextmanager
def folder_of_held(folder: Path) -> Iterator[Path]:
    """A folder for files that nothing needs afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Held:
    """What reached the stages of a block so far; `reached` are the block's arguments, of each batch.

    The files in `folder` are written over by the next block's.
    """

    def __init__(self, network: Network, block: nn.Module, reached: Sequence[Arguments], folder: Path) -> None:
        self._network, self._block, self._reached, self._folder = network, block, reached, folder
        self._done: list[_Stage] = []
        self._next: _Stage | None = None
        self._given: list[_Stage] = []
        self._passed: list[nn.Module] = []

    def advance(self, layers: Sequence[nn.Module]) -> None:
        """The next forwards go up to these layers, which share an input and are called once, or through the block where
        none are named. What the last ones were given is settled."""
        if self._next is not None and self._next.layers == list(layers):
            return  # some of them are looked at after the others
        if self._next is not None and len(self._next.shapes) == len(self._reached):
            self._done.append(self._next)
        self._next = None
        self._given, self._passed = [], []
        if self._done:
            self._find(layers[0] if layers else None)
        if layers and self._network.holds and all(_is_linear(layer) for layer in layers):
            self._next = _Stage(list(layers), self._folder / f"{len(self._done)}.bin")
            self._next.file.unlink(missing_ok=True)

    def note(self, rows: Tensor) -> None:
        """What reaches these layers of the next batch."""
        if self._next is None or len(self._next.shapes) == len(self._reached):
            return
        try:
            if shutil.disk_usage(self._folder.parent).free < rows.nbytes + _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._next.add(rows)
        except OSError as error:
            LOGGER.warning("%s: what reaches layers is computed anew each time: %s", self._folder.parent, error)
            self._next.file.unlink(missing_ok=True)
            self._next, self._network.holds = None, False

    def begun(self, i: int) -> contextlib.AbstractContextManager[None]:
        """Within it a forward of batch number `i` computes nothing that is settled."""
        return self._after(self._given, self._passed, lambda stage: stage.read(i))

    def settle(self) -> None:
        """No layer is looked at any more: what the block gives is all that is still to be computed."""
        self.advance(())
        self._network.begun = self.begun

    @torch.no_grad()
    def _find(self, until: nn.Module | None) -> None:
        """As few of the stages as what comes to `until`, or out of the block, needs.

        Of a block of the kind of an earlier one the same ones are needed, if nothing then is NaN.
        """
        example, n = first_example(self._reached[0]), n_examples(self._reached[0])
        rows = [stage.read(0) for stage in self._done]
        if any(len(each) % n for each in rows):
            return
        held = {id(stage): each[: len(each) // n] for stage, each in zip(self._done, rows, strict=True)}
        kind = type(self._block), until is None, *(len(stage.layers) for stage in self._done)

        def found(needed: Collection[int]) -> Tensor | None:
            self._give(needed)
            with self._after(self._given, self._passed, lambda stage: held[id(stage)]):
                return self._answer(example, until)

        if (needed := self._network.needed.get(kind)) is not None:
            answer = found(needed)
            if answer is not None and bool(answer.isfinite().all()):
                return self._give(needed if len(needed) < len(self._done) else None)
        needed = tuple(range(len(self._done)))
        wanted = found(needed)
        for left_out in needed if wanted is not None else ():
            fewer = tuple(at for at in needed if at != left_out)
            answer = found(fewer)
            if answer is not None and wanted is not None and torch.equal(answer, wanted):
                needed = fewer
        if wanted is not None:
            self._network.needed[kind] = needed
        self._give(needed if len(needed) < len(self._done) else None)

    def _give(self, needed: Collection[int] | None) -> None:
        """From now on these stages are given what reached them, and the others passed by; none is where it is None."""
        self._given = [self._done[at] for at in needed or ()]
        passed = [stage for at, stage in enumerate(self._done) if needed is not None and at not in needed]
        self._passed = [layer for stage in passed for layer in stage.layers]

    def _answer(self, example: Arguments, until: nn.Module | None) -> Tensor | None:
        """What an example comes to; None where the network refuses it."""
        rows: list[Tensor] = []

        def catch(_: nn.Module, args: tuple) -> None:
            rows.append(args[0].clone())
            raise Stop

        hook = contextlib.nullcontext() if until is None else until.register_forward_pre_hook(catch)
        try:
            with hook:
                return self._network.tried(self._block, example)
        except Stop:
            return rows[0]

    @contextlib.contextmanager
    def _after(
        self, given: Sequence[_Stage], passed: Sequence[nn.Module], read: Callable[[_Stage], Tensor]
    ) -> Iterator[None]:  # fmt: skip
        """Meanwhile the layers of some stages are given what `read` gives, and others give NaN."""
        forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        for stage in given:
            rows = read(stage)
            for layer in stage.layers:
                forwards[layer] = lambda *_, forward=layer.forward, rows=rows: forward(rows)
        for layer in passed:
            forwards[layer] = _passing(layer)
        with patched(forwards):
            yield


def _is_linear(layer: nn.Module) -> bool:
    return weight_of(layer).dim() == 2 and not isinstance(layer, nn.Embedding) and unfolds(layer)


def _passing(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """NaN of the shape of a linear layer's outputs."""
    layout = layout_of(layer)
    assert layout is not None
    width = len(layout.matrix(weight_of(layer)))
    return lambda rows: rows.new_full((*rows.shape[:-1], width), torch.nan)
