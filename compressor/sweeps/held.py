"""What reaches the layers of a block, held in files, so that no forward computes again what gave it.

A block is run once for the inputs of each stage of its layers, and once for what it gives: each time from its beginning
on, though all that comes before the stage is as it was. So layers of earlier stages are given what reached them, where
their products are needed, as by a residual connection, and passed by with NaN of their outputs' shape where they are
not: which is tried on an example, stage by stage. What depends on the values that it is given may need more than the
example does: where NaN comes out, the forward was in vain, and nothing is held from then on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.log import LOGGER
from compressor.graph.blocks import first_tensor, layout_of, on_input, patched, tensors_in, unfolds, weight_of
from compressor.sweeps.network import Arguments, Network, Stop, first_example

_ROOM = 2_000_000_000
"""Bytes that are left free on the disk, for what is to stay."""
_LARGE = 1000.0
"""How large what takes the place of a product is, where it is tried whether any choice depends on it."""


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
        held = torch.empty(shape, dtype=self.dtype)  # and no bytes of Python's: how it is aligned, sums depend on
        with self.file.open("rb") as file:
            file.seek(before * size)
            file.readinto(held.flatten().view(torch.uint8).numpy().data)
        return held.to(self.device)


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

    @property
    def passes(self) -> bool:
        """Whether forwards give NaN in the place of what nothing seemed to need."""
        return bool(self._passed)

    def distrust(self) -> None:
        """What seemed not to be needed is needed: nothing is held any more."""
        LOGGER.warning(
            "%s: forwards depend on values; what reaches layers is computed anew", self._network.checkpoint.path
        )
        self._network.holds, self._next = False, None
        self._done, self._given, self._passed = [], [], []

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

        Of a block of the kind of an earlier one the same ones are needed, if an example comes to the same with them.
        """
        everything = tuple(range(len(self._done)))
        kind = type(self._block), until is None, *(len(stage.layers) for stage in self._done)
        for example in first_example(self._reached[0]), self._reached[0]:  # some know not how to be cut
            rows: dict[int, list[Tensor]] = {id(stage): [] for stage in self._done}
            with contextlib.ExitStack() as hooks:
                for stage in self._done:
                    hooks.enter_context(on_input(stage.layers[0], _catching(rows[id(stage)])))
                wanted = self._answer(example, until)
            if wanted is not None:
                break
        if wanted is None or any(len(each) != 1 for each in rows.values()):
            return self._give(None)

        def suffice(needed: Collection[int], values: float = torch.nan) -> bool:
            self._give(needed)
            with self._after(self._given, self._passed, lambda stage: rows[id(stage)][0].clone(), values):
                return _equal(self._answer(example, until), wanted)

        needed = self._network.needed.get(kind)
        if needed is None or not suffice(needed):
            needed = everything
            for left_out in everything if suffice(everything) else ():
                fewer = tuple(at for at in needed if at != left_out)
                needed = fewer if suffice(fewer) else needed
            if not all(suffice(needed, values) for values in (_LARGE, -_LARGE)):  # the largest of NaN is a place, too
                needed = everything
            self._network.needed[kind] = needed
        self._give(needed if len(needed) < len(self._done) else None)

    def _give(self, needed: Collection[int] | None) -> None:
        """From now on these stages are given what reached them, and the others passed by; none is where it is None."""
        self._given = [self._done[at] for at in needed or ()]
        passed = [stage for at, stage in enumerate(self._done) if needed is not None and at not in needed]
        self._passed = [layer for stage in passed for layer in stage.layers]

    def _answer(self, example: Arguments, until: nn.Module | None) -> list[Tensor] | None:
        """What an example comes to, and what modules keep of it; None where the network refuses it."""
        rows: list[Tensor] = []

        def catch(given: Tensor) -> None:
            rows.append(given.clone())
            raise Stop

        hook = contextlib.nullcontext() if until is None else on_input(until, catch)
        with torch.random.fork_rng([]):  # a draw of the network's is no other one for having been tried
            try:
                with hook:
                    answer = self._network.tried(self._block, example)
            except Stop:
                answer = rows[0]
        if answer is None:
            return None
        kept = (each.clone() for module in self._block.modules() for each in tensors_in(_attributes(module)))
        return [answer, *kept]

    @contextlib.contextmanager
    def _after(
        self, given: Sequence[_Stage], passed: Sequence[nn.Module], read: Callable[[_Stage], Tensor],
        values: float = torch.nan,
    ) -> Iterator[None]:  # fmt: skip
        """Meanwhile the layers of some stages are given what `read` gives, and others give NaN, or other `values`."""
        forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        for stage in given:
            rows = read(stage)
            for layer in stage.layers:
                forwards[layer] = _giving(layer, rows)
        for layer in passed:
            forwards[layer] = _passing(layer, values)
        with patched(forwards):
            yield


def _is_linear(layer: nn.Module) -> bool:
    return weight_of(layer).dim() == 2 and not isinstance(layer, nn.Embedding) and unfolds(layer)


def _catching(rows: list[Tensor]) -> Callable[[Tensor], None]:
    """Notes what reaches a layer, as files give it."""
    return lambda given: rows.append(given.clone(memory_format=torch.contiguous_format))


def _attributes(module: nn.Module) -> dict[str, object]:
    """What a module holds besides parameters and other modules."""
    own: dict[str, object] = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own.update(module.named_buffers(recurse=False))
    return own


def _equal(found: Sequence[Tensor] | None, wanted: Sequence[Tensor]) -> bool:
    return found is not None and len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def _giving(layer: nn.Module, rows: Tensor) -> Callable[..., Tensor]:
    """What a layer makes of these rows; NaN where it is called again."""
    left, forward, again = [rows], layer.forward, _passing(layer)

    def give(*args: Any, **kwargs: Any) -> Tensor:
        if not left:
            return again(*args, **kwargs)
        if args:
            return forward(left.pop(), *args[1:], **kwargs)
        return forward(**{**kwargs, next(iter(kwargs)): left.pop()})

    return give


def _passing(layer: nn.Module, values: float = torch.nan) -> Callable[..., Tensor]:
    """NaN of the shape of a linear layer's outputs, or numbers about as large as `values`."""
    layout = layout_of(layer)
    assert layout is not None
    width = len(layout.matrix(weight_of(layer)))
    drawn = values * torch.randn(width, generator=torch.Generator().manual_seed(width)).to(weight_of(layer).device)

    def give(*args: Any, **kwargs: Any) -> Tensor:
        rows = first_tensor((*args, *kwargs.values()))
        return drawn.to(rows.dtype).expand(*rows.shape[:-1], width).clone()

    return give
