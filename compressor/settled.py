"""The part of a network without blocks that will not change any more, run once.

Such a network is one block, and what reaches a layer shows by running all that comes before it, for every layer anew.
But what an nn.Sequential strings together is a chain: of modules whose layers are all done, the output of the last is
held for every batch, and the forward begins there. The modules before it are passed by with NaN of their shape; that
nothing later reads it, as a shortcut would, is tried on an example for every place where the forward may begin.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from compressor.graph.blocks import first_tensor
from compressor.streaming import Arguments, Network

LIMIT, FLOAT = 256_000_000, 4
"""Bytes of outputs that are held; where there are more, the forward begins earlier."""


class _Stop(Exception):
    """Ends a forward once the last settled module has answered."""


class Settled:
    """What of `block` is settled, nothing at first."""

    def __init__(self, network: Network, block: nn.Module, reached: Sequence[Arguments]) -> None:
        self._network, self._block, self._reached = network, block, reached
        self._modules: list[nn.Module] = []
        self._shapes: list[torch.Size] = []  # of what they give for one example
        self._n_examples = sum(len(first_tensor((*args, *kwargs.values()))) for args, kwargs in reached)
        self._n, self._held = 0, list[Tensor]()
        self._allowed: Collection[int] = ()
        if reached and len({_shapes_of(arguments) for arguments in reached}) == 1:
            self._find()

    @torch.no_grad()
    def advance(self, changing: Iterable[int]) -> None:
        """Settles what has none of the parameters, by identity, that are still to change."""
        n, changing = 0, set(changing)
        for number, (module, shape) in enumerate(zip(self._modules, self._shapes, strict=True), 1):
            if any(id(parameter) in changing for parameter in module.parameters()):
                break
            if number in self._allowed and FLOAT * math.prod(shape) * self._n_examples <= LIMIT:
                n = number
        if n > self._n:
            held = [self._output(self._modules[n - 1], i, arguments) for i, arguments in enumerate(self._reached)]
            self._n, self._held = n, held

    def begun(self, i: int) -> contextlib.AbstractContextManager[None]:
        """Within it a forward of batch number `i` begins after what is settled."""
        return self._skipping(self._n, self._held[i] if self._n else None)

    def _output(self, module: nn.Module, i: int, arguments: Arguments) -> Tensor:
        found: list[Tensor] = []

        def catch(_: nn.Module, args: tuple, output: Tensor) -> None:
            found.append(output.clone())
            raise _Stop

        handle = module.register_forward_hook(catch)
        try:
            with self.begun(i), contextlib.suppress(_Stop):
                self._network.step(self._block, arguments)
        finally:
            handle.remove()
        return found[0]

    @contextlib.contextmanager
    def _skipping(self, n: int, held: Tensor | None) -> Iterator[None]:
        """The first `n` modules do nothing, and the last of them gives what is held."""
        passed: list[Callable[[Tensor], Tensor]] = [
            lambda x, shape=shape: x.new_full((len(x), *shape[1:]), math.nan) for shape in self._shapes[:n]
        ]
        if held is not None:
            passed[-1:] = [lambda x: held.clone()]  # what comes next may work in place
        try:
            for module, forward in zip(self._modules, passed, strict=False):
                module.forward = forward
            yield
        finally:
            for module in self._modules[:n]:
                module.__dict__.pop("forward", None)

    @torch.no_grad()
    def _find(self) -> None:
        """The modules of chains, in the order of their calls, and after which of them a forward may begin."""
        example = _first_example(self._reached[0])
        called: list[nn.Module] = []
        outputs: list[Tensor] = []
        chained = _chained(self._block)

        def note(module: nn.Module, args: tuple, output: object) -> None:
            called.append(module)
            chains = len(args) == 1 and isinstance(output, Tensor) and output.dtype == args[0].dtype
            outputs.append(output.clone() if chains and len(output) == len(args[0]) else torch.empty(0))

        handles = [module.register_forward_hook(note) for module in chained]
        try:
            wanted = self._network.step(self._block, example)
        except Exception:  # a network that takes no single example is run as a whole
            return
        finally:
            for handle in handles:
                handle.remove()
        if len(set(map(id, called))) < len(called) or any(not len(output) for output in outputs):
            return
        self._modules, self._shapes = called, [output.shape for output in outputs]
        self._allowed = [n for n, held in enumerate(outputs, 1) if self._same(n, held, example, wanted)]

    def _same(self, n: int, held: Tensor, example: Arguments, wanted: Tensor) -> bool:
        try:
            with self._skipping(n, held):
                return torch.equal(self._network.step(self._block, example), wanted)
        except Exception:  # whatever a network says to NaN
            return False


def _chained(block: nn.Module) -> list[nn.Module]:
    """The modules that outermost nn.Sequentials hold."""
    found: list[nn.Module] = []
    for child in block.children():
        if type(child) is nn.Sequential:
            found += child.children()
        else:
            found += _chained(child)
    return list(block.children()) if type(block) is nn.Sequential else found


def _first_example(arguments: Arguments) -> Arguments:
    args, kwargs = arguments
    first = {name: each[:1] if each.dim() else each for name, each in kwargs.items()}
    return tuple(each[:1] for each in args), first


def _shapes_of(arguments: Arguments) -> tuple:
    """Of the tensors, without their examples."""
    args, kwargs = arguments
    return tuple(each.shape[1:] for each in (*args, *kwargs.values()))
