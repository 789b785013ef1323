"""Sweeps over the blocks of a network, one block's weights in memory at a time.

`Network` knows how to bring a network to its first block, through one block, and from the last block to its end. A
*survey* runs over the untouched network; the *encoding* sweep visits each block once with inputs from the compressed
prefix. Hidden states between blocks are the only activations that are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import DataError
from compressor.graph.blocks import block_names, detached, fast_bfloat16, first_tensor, layers, stages, unfold_inputs

Batch = dict[str, Tensor]


class _Stop(Exception):
    """Ends a forward once it has shown what was asked."""


class Network:
    """A checkpoint's module whose weights are read when their block is due.

    `batches` are the forward's keyword arguments (or {"": tensor} for one positional input).
    """

    def __init__(self, checkpoint: Any, fast: bool | None = None) -> None:
        self.checkpoint = checkpoint
        self.module: nn.Module = checkpoint.build()
        if hasattr(self.module, "config"):
            self.module.config.use_cache = False
        self.module.requires_grad_(False)
        self.blocks = block_names(self.module)
        self.fast = fast_bfloat16() if fast is None else fast
        in_blocks = tuple(f"{name}." for name in self.blocks)
        names = list(dict(self.module.named_parameters())) + [
            name for name in self.module.state_dict() if name not in dict(self.module.named_parameters())
        ]
        self.outside = [name for name in names if not name.startswith(in_blocks)] if self.blocks != [""] else []
        self._replaced: dict[str, Tensor] = {}

    def replace(self, name: str, tensor: Tensor) -> None:
        """From now on the network computes with `tensor` in place of the checkpoint's."""
        self._replaced[name] = tensor

    def block(self, name: str) -> nn.Module:
        return self.module.get_submodule(name) if name else self.module

    @contextlib.contextmanager
    def loaded(self, names: list[str]) -> Iterator[None]:
        """Holds the named parameters in memory, float32, with what was replaced in place."""
        self.checkpoint.materialise(self.module, names)
        self._each(names, lambda name, p: self._replaced.get(name, p.data).float())
        try:
            yield
        finally:
            self._each(names, lambda name, p: torch.empty_like(p.data, device="meta"))

    def _each(self, names: list[str], change: Callable[[str, nn.Parameter], Tensor]) -> None:
        known = dict(self.module.named_parameters(remove_duplicate=False))
        groups: dict[int, list[str]] = {}
        for name, parameter in known.items():
            groups.setdefault(id(parameter), []).append(name)
        done: set[int] = set()
        for name in names:
            parameter = known.get(name)
            if parameter is None or id(parameter) in done or not parameter.is_floating_point():
                continue
            done.add(id(parameter))
            aliases = groups[id(parameter)]
            canonical = next((alias for alias in aliases if alias in self._replaced), name)
            fresh = nn.Parameter(change(canonical, parameter), requires_grad=False)
            for alias in aliases:
                parent, _, attribute = alias.rpartition(".")
                setattr(self.module.get_submodule(parent), attribute, fresh)

    def names_in(self, block: str) -> list[str]:
        """The names of the parameters and persistent buffers of a block, as the module has them."""
        prefix = f"{block}." if block else ""
        return [f"{prefix}{name}" for name in self.block(block).state_dict(keep_vars=True)]

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.fast)

    def call(self, batch: Batch) -> Any:
        """The whole forward of a batch."""
        return self.module(batch[""]) if "" in batch else self.module(**batch)

    @torch.no_grad()
    def enter(self, batches: list[Batch]) -> list[tuple[tuple, dict]]:
        """The arguments with which each batch reaches the first block."""
        if self.blocks == [""]:
            return [((batch[""],), {}) if "" in batch else ((), dict(batch)) for batch in batches]
        reached: list[tuple[tuple, dict]] = []

        def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
            reached.append((detached(args), detached(kwargs)))
            raise _Stop

        handle = self.block(self.blocks[0]).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self.loaded(self.outside):
                for batch in batches:
                    with contextlib.suppress(_Stop):
                        self.call(batch)
        finally:
            handle.remove()
        if len(reached) != len(batches):
            raise DataError(f"{self.checkpoint.path}: the first block was not reached by the data; check its inputs")
        return reached

    def step(self, block: nn.Module, arguments: tuple[tuple, dict]) -> Tensor:
        """The next hidden state, in the dtype of the last."""
        args, kwargs = arguments
        with self.autocast():
            output = first_tensor(block(*args, **kwargs))
        return output.float()

    @staticmethod
    def advance(arguments: tuple[tuple, dict], hidden: Tensor) -> tuple[tuple, dict]:
        """The arguments of the next block: the same but for the hidden state."""
        args, kwargs = arguments
        if args:
            return ((hidden, *args[1:]), kwargs)
        return (), {**kwargs, "hidden_states": hidden}

    @contextlib.contextmanager
    def tail(self) -> Iterator[Callable[[Batch, Tensor], Any]]:
        """A function from (batch, last hidden state) to the network's output; the blocks are passed by."""
        held: list[Tensor] = []
        for i, name in enumerate(self.blocks):
            self.block(name).forward = (lambda *a, **k: held[0]) if i == 0 else _pass_by

        def run(batch: Batch, hidden: Tensor) -> Any:
            held[:] = [hidden]
            return self.call(batch)

        try:
            with self.loaded(self.outside):
                yield run
        finally:
            for name in self.blocks:
                del self.block(name).forward  # the class's own shows again

    def sweep(self, batches: list[Batch]) -> Iterator[tuple[str, nn.Module, list[tuple[tuple, dict]]]]:
        """Each block, loaded, with the arguments of all batches; goes on with what the block then computes."""
        reached = self.enter(batches)
        for name in self.blocks:
            block = self.block(name)
            with self.loaded(self.names_in(name)):
                yield name, block, reached
                if name != self.blocks[-1] or name:
                    with torch.no_grad():
                        for i, arguments in enumerate(reached):
                            reached[i] = self.advance(arguments, self.step(block, arguments))
        self.last = [first_tensor(list(args) or list(kwargs.values())) for args, kwargs in reached]


def _pass_by(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def layer_stages(network: Network, block: nn.Module, prefix: str, arguments: tuple[tuple, dict]) -> list:
    """The block's encodable layers in stages, by running one batch."""
    order: list[tuple[str, int]] = []
    keep: list[Tensor] = []
    found = layers(block, prefix)

    def note(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(_: nn.Module, args: tuple) -> None:
            order.append((name, id(args[0])))
            keep.append(args[0])  # so that no other tensor gets its identity

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in found.items()
        if not isinstance(module, nn.Embedding)
    ]
    try:
        network.step(block, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return stages(order)


@torch.no_grad()
def second_moments(
    network: Network,
    block: nn.Module,
    found: Mapping[str, nn.Module],
    names: list[str],
    calls: int,
    reached: list[tuple[tuple, dict]],
    importance: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """H = mean over tokens of t·xxᵀ (in, in) per layer; t is the importance of a token for that layer, or 1.

    The layers share their input, so that without importance they share one H. The forward ends at the last call.
    """
    sums: dict[str, Tensor] = {}
    counts = {"tokens": 0, "calls": 0}
    lead = found[names[0]]
    weighted = [name for name in names if name in importance]

    def watch(_: nn.Module, args: tuple) -> None:
        with torch.autocast("cpu", enabled=False):
            rows = unfold_inputs(lead, args[0])
            for name in weighted or names[:1]:
                seen = rows
                if name in importance:
                    token = importance[name][counts["tokens"] : counts["tokens"] + len(rows)]
                    seen = rows * token.sqrt().unsqueeze(1)
                product = seen.T @ seen
                sums[name] = sums[name].add_(product) if name in sums else product
        counts["tokens"] += len(rows)
        counts["calls"] += 1
        if counts["calls"] == calls:
            raise _Stop

    handle = lead.register_forward_pre_hook(watch)
    try:
        for arguments in reached:
            counts["calls"] = 0
            with contextlib.suppress(_Stop):
                network.step(block, arguments)
    finally:
        handle.remove()
    for total in sums.values():
        total.div_(max(1, counts["tokens"]))
    shared = next(iter(sums.values()))
    return {name: sums.get(name, shared) for name in names}
