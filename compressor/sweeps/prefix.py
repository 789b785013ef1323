"""The part of a network without blocks that will not change any more, run once.

Such a network is one block, and what reaches a layer shows by running all that comes before it, for every layer anew.
But what an nn.Sequential strings together is a chain: of modules whose layers are all done, the output of the last is
held for every batch, and the forward begins there. The modules before it are passed by with NaN of their shape; that
nothing later reads it, as a shortcut would, is tried on an example for every place where the forward may begin.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.graph.blocks import patched
from compressor.sweeps.network import Arguments, Network, Stop, first_example, n_examples

LIMIT = 256_000_000
"""Bytes of outputs that are held; where there are more, the forward begins earlier."""


class Settled:
    """What of `block` is settled, nothing at first; `changing` are the weights that are to be `done` with before.

    chain    the modules that may be settled, in the order of their calls
    starts   after how many of them a forward may begin
    """

    def __init__(
        self, network: Network, block: nn.Module, reached: Sequence[Arguments], changing: Iterable[Tensor]
    ) -> None:
        self._network, self._block, self._reached = network, block, reached
        self._changing = set(map(id, changing))
        self.chain: list[nn.Module] = []
        self._outputs: list[Tensor] = []  # what they give for one example, on meta
        self.starts: list[int] = []
        self._n, self._held = 0, list[Tensor]()
        if reached and len({_shapes_of(arguments) for arguments in reached}) == 1:
            self._find()

    def done(self, weight: Tensor) -> None:
        """From now on this weight stays as it is."""
        self._changing.discard(id(weight))

    @torch.no_grad()
    def advance(self, layers: Sequence[nn.Module] = ()) -> None:
        """Holds the output of the last module up to which nothing changes any more, whatever the next layers are."""
        n, examples = 0, sum(map(n_examples, self._reached))
        for number, (module, output) in enumerate(zip(self.chain, self._outputs, strict=True), 1):
            if any(id(parameter) in self._changing for parameter in module.parameters()):
                break
            if number in self.starts and output.nbytes * examples <= LIMIT:
                n = number
        if n > self._n:
            held = [self._output(self.chain[n - 1], i, arguments) for i, arguments in enumerate(self._reached)]
            self._n, self._held = n, held

    def note(self, rows: Tensor) -> None:
        """What reaches the next layers: it is the outputs of modules that are held."""

    @property
    def passes(self) -> bool:
        """Whether forwards give NaN in the place of what nothing seemed to need."""
        return bool(self._n)

    def distrust(self) -> None:
        """What seemed not to be needed is needed: nothing is settled any more."""
        self.chain, self._outputs, self.starts, self._n, self._held = [], [], [], 0, []

    def begun(self, i: int) -> contextlib.AbstractContextManager[None]:
        """Within it a forward of batch number `i` begins after what is settled."""
        return self._after(self._n, self._held[i]) if self._n else contextlib.nullcontext()

    def every(self, step: int, first: int) -> Every:
        """For forwards of every so many of the batches, from number `first` on."""
        return Every(self, step, first)

    def _output(self, module: nn.Module, i: int, arguments: Arguments) -> Tensor:
        found: list[Tensor] = []

        def catch(_: nn.Module, args: tuple, output: Tensor) -> None:
            found.append(output.clone())
            raise Stop

        with module.register_forward_hook(catch), self.begun(i), contextlib.suppress(Stop):
            self._network.step(self._block, arguments)
        return found[0]

    def _after(self, n: int, held: Tensor) -> contextlib.AbstractContextManager[None]:
        """Meanwhile the first `n` modules do nothing, and the last of them gives what is held."""
        forwards: list[Callable[[Tensor], Tensor]] = [
            lambda x, output=output: x.new_full((len(x), *output.shape[1:]), math.nan) for output in self._outputs[:n]
        ]
        forwards[-1] = lambda x: held.clone()  # what comes next may work in place
        return patched(dict(zip(self.chain[:n], forwards, strict=True)))

    @torch.no_grad()
    def _find(self) -> None:
        """The modules of chains, in the order of their calls, and after which of them a forward may begin."""
        example = first_example(self._reached[0])
        called: list[nn.Module] = []
        outputs: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            for module in _chained(self._block):
                hooks.enter_context(module.register_forward_hook(_noting(called, outputs)))
            wanted = self._network.tried(self._block, example)
        if wanted is None or len(set(called)) < len(called) or len(outputs) < len(called):
            return
        self.chain, self._outputs = called, [torch.empty_like(output, device="meta") for output in outputs]
        for n, held in enumerate(outputs, 1):
            with self._after(n, held):
                found = self._network.tried(self._block, example)
            if found is not None and torch.equal(found, wanted):
                self.starts.append(n)


@dataclass(frozen=True)
class Every:
    """What is settled, for some of the batches."""

    settled: Settled
    step: int
    first: int

    def advance(self, layers: Sequence[nn.Module]) -> None:
        self.settled.advance(layers)

    def note(self, rows: Tensor) -> None:
        self.settled.note(rows)

    @property
    def passes(self) -> bool:
        return self.settled.passes

    def distrust(self) -> None:
        self.settled.distrust()

    def begun(self, i: int) -> contextlib.AbstractContextManager[None]:
        return self.settled.begun(self.step * i + self.first)


def _noting(called: list[nn.Module], outputs: list[Tensor]) -> Callable[[nn.Module, tuple, object], None]:
    """A hook that notes a module, and its output if it is of a chain: of one tensor, another of as many examples."""

    def note(module: nn.Module, args: tuple, output: object) -> None:
        called.append(module)
        match args, output:
            case (Tensor() as given,), Tensor() as gives if given.dim() and gives.dim():
                if gives.dtype == given.dtype and len(gives) == len(given):
                    outputs.append(gives.clone())

    return note


def _chained(block: nn.Module) -> list[nn.Module]:
    """The modules that outermost nn.Sequentials hold."""
    found: list[nn.Module] = []
    for child in block.children():
        if type(child) is nn.Sequential:
            found += child.children()
        else:
            found += _chained(child)
    return list(block.children()) if type(block) is nn.Sequential else found


def _shapes_of(arguments: Arguments) -> tuple:
    """Of the tensors, without their examples."""
    args, kwargs = arguments
    return tuple(each.shape[1:] for each in (*args, *kwargs.values()))
