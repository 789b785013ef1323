"""Sweeps over the blocks of a network, one block's weights in memory at a time.

`Network` knows how to bring a network to its first block, through one block, and from the last block to its end. A
*survey* runs over the untouched network; the *encoding* sweep visits each block once with inputs from the compressed
prefix. Hidden states between blocks are the only activations that are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoints.skeleton import parameter_names
from compressor.core.batch import Batch, arguments, call
from compressor.core.device import HOST, fast_bfloat16, put_buffers
from compressor.core.errors import is_out_of_memory
from compressor.core.memory import SLACK, Slack, give_back
from compressor.core.resources import refuse_shortage
from compressor.graph.blocks import (
    block_names,
    detached,
    first_tensor,
    patched,
    tensors_in,
    without_cache,
)  # fmt: skip
from compressor.learning.head import Logits

Arguments = tuple[tuple, dict]
Begun = Callable[[int], contextlib.AbstractContextManager[None]]
"""What a block's forward of batch number i runs within."""


class Stop(Exception):
    """Ends a forward once it has shown what was asked."""


class NoChain(Exception):
    """Ends a forward once a block is given something else than what the one before gave."""


def head_of(module: nn.Module) -> nn.Linear | None:
    """The output head of a language model, or None."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find else None
    return head if isinstance(head, nn.Linear) else None


class Network:
    """A checkpoint's module whose weights are read when their block is due.

    `batches` are the forward's keyword arguments (or {"": tensor} for one positional input), wherever they lie.

    device   where blocks are computed with: weights come there when they are due, and batches as they enter
    needed   of kinds of blocks, which stages of layers are computed again for what comes after them: see `sweeps.held`
    slack    gives back what forwards and what is between them leave free
    holds    whether there is room in files for what reaches its layers
    begun    what the block that is due is run within by `sweep`; of each block anew
    logits   what becomes of an output head's outputs, once `backward.find_logits` has looked; None: unknown
    """

    def __init__(self, checkpoint: Any, fast: bool | None = None, device: str | torch.device = HOST) -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.module: nn.Module = checkpoint.build()
        put_buffers(self.module, self.device)
        without_cache(self.module)
        self.module.requires_grad_(False)
        self.blocks = block_names(self.module)
        self.fast = fast_bfloat16(self.device) if fast is None else fast
        in_blocks = tuple(f"{name}." for name in self.blocks)
        names = list(dict(self.module.named_parameters())) + [
            name for name in self.module.state_dict() if name not in dict(self.module.named_parameters())
        ]
        self.outside = [name for name in names if not name.startswith(in_blocks)] if self.blocks != [""] else []
        self._replaced: dict[str, Callable[[], Tensor]] = {}
        self._calls: list[list[Arguments]] = []
        self._entered: list[Tensor] = []
        self._wrap: Callable[[Tensor], Any] = _as_it_is
        self._by_keyword = False
        self.last: list[Tensor] = []
        self.begun: Begun = _from_the_start
        self.slack = Slack(SLACK)
        self.holds, self.needed = True, dict[tuple, tuple[int, ...]]()
        self.logits: Logits | None = Logits()

    def replace(self, name: str, decode: Callable[[], Tensor]) -> None:
        """From now on the network computes with what `decode` gives, each time it is due, not with the checkpoint's."""
        self._replaced[name] = decode

    def block(self, name: str) -> nn.Module:
        return self.module.get_submodule(name) if name else self.module

    @contextlib.contextmanager
    def loaded(self, names: list[str]) -> Iterator[None]:
        """Holds the named parameters in memory, float32, with what was replaced in place."""
        aliases = {name: group for group in parameter_names(self.module).values() for name in group}
        groups = list({group[0]: group for group in (aliases.get(name, [name]) for name in names)}.values())
        for group in groups:  # one at a time, so that one alone is there in its stored precision as well
            replaced = next((name for name in group if name in self._replaced), None)
            if replaced is None or group[0] not in aliases:
                self.checkpoint.materialise(self.module, group[:1], self.device)
            if group[0] in aliases:
                self._set(group, lambda p, name=replaced: (self._replaced[name]() if name else p.data).float())
        self.slack.give_back()
        try:
            yield
        finally:
            for group in groups:
                if group[0] in aliases:
                    self._set(group, lambda p: torch.empty_like(p.data, device="meta"))
            give_back()

    def _set(self, names: list[str], change: Callable[[nn.Parameter], Tensor]) -> None:
        """Puts something else in the place of a parameter of floats, under all of its names."""
        parameter = self.module.get_parameter(names[0])
        if not parameter.is_floating_point():
            return
        fresh = nn.Parameter(change(parameter), requires_grad=False)
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(self.module.get_submodule(parent), attribute, fresh)

    def names_in(self, block: str) -> list[str]:
        """The names of the parameters and persistent buffers of a block, as the module has them."""
        prefix = f"{block}." if block else ""
        return [f"{prefix}{name}" for name in self.block(block).state_dict(keep_vars=True)]

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast)

    def call(self, batch: Batch) -> Any:
        """The whole forward of a batch."""
        return call(self.module, self.placed(batch))

    def placed(self, batch: Batch) -> Batch:
        """A batch where the network is."""
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @torch.no_grad()
    def enter(self, batches: list[Batch]) -> list[Arguments]:
        """The arguments with which each batch reaches the first block; `arguments` then knows those of the others.

        Blocks may differ in what else they are called with (masks, position embeddings), so the network is run once
        with blocks that only note it. A network whose blocks are not called once each, in order, each on what the one
        before gave, is one block; so is one that makes more of what a block gives than its hidden state.
        """
        if self.blocks != [""]:
            with self.loaded(self._before_head()), contextlib.suppress(NoChain):
                for wrap in (_as_it_is, _in_a_tuple):
                    self._calls, self._wrap = [self._note_calls(batch, wrap) for batch in batches], wrap
                    if all(len(calls) == len(self.blocks) for calls in self._calls) and self._passes_on(batches[0]):
                        entered, self._entered = self._entered, []
                        return [self.arguments(i, 0, state) for i, state in enumerate(entered)]
                    self._entered.clear()
            self.blocks, self.outside, self._entered = [""], [], []
        return [arguments(self.placed(batch)) for batch in batches]

    @property
    def own_head(self) -> str | None:
        """The weight of an output head behind the blocks, which no other module has; None where there is none."""
        head = head_of(self.module)
        if head is None:
            return None
        uses = [name for name, p in self.module.named_parameters(remove_duplicate=False) if p is head.weight]
        return uses[0] if len(uses) == 1 and uses[0] in self.outside else None

    def _before_head(self) -> list[str]:
        """What lies outside of the blocks but for an output head of its own, which only comes after them."""
        return [name for name in self.outside if name != self.own_head]

    def _note_calls(self, batch: Batch, wrap: Callable[[Tensor], Any]) -> list[Arguments]:
        calls: list[Arguments] = []
        given: list[Tensor] = []

        def noting(index: int) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.get("hidden_states")
                if len(calls) != index or not isinstance(hidden, Tensor):
                    calls.clear()
                    raise Stop
                if given and hidden.shape == given[0].shape[1:]:
                    raise Stop  # the wrong wrapping
                if given and not _untouched(hidden, given[0]):
                    raise NoChain
                given[:] = [hidden.clone()]
                if index == 0:
                    self._entered.append(hidden.detach())
                rest = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
                calls.append((detached(tuple(args[1:])) if args else (), detached(rest)))
                self._by_keyword = not args
                if index == len(self.blocks) - 1:
                    raise Stop
                return wrap(given[0])

            return forward

        with self._replaced_blocks([noting(index) for index in range(len(self.blocks))]):
            try:
                self.call(batch)
            except Stop:
                pass
            except NoChain:
                raise
            except Exception as error:  # a stranger's forward, which asks for more than what its blocks seemed to give
                refuse_shortage(error)
                calls.clear()
        return calls

    def _passes_on(self, batch: Batch) -> bool:
        """Whether what a block gives goes to the next one and nowhere else: NaN in its place is seen nowhere else.

        A language model ends before its head: the logits of a batch are the largest thing there is.
        """
        whole, last = self._before_head() == self.outside, self.blocks[-1]
        shown: list[Any] = []

        def poisoned(name: str) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                shown.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
                if name == last and not whole:
                    raise Stop
                return self._wrap(self._entered[0] if name == last else torch.full_like(self._entered[0], torch.nan))

            return forward

        def before_head(*args: Any, **kwargs: Any) -> Any:
            shown.append(args)
            raise Stop

        head = head_of(self.module)
        try:
            blocks = self._replaced_blocks([poisoned(name) for name in self.blocks])
            with blocks, patched({} if head is None else {head: before_head}), contextlib.suppress(Stop):
                shown.append(self.call(batch))
        except Exception as error:  # a stranger's forward
            refuse_shortage(error)
            return False
        return not any(bool(tensor.isnan().any()) for tensor in tensors_in(shown) if tensor.is_floating_point())

    def _replaced_blocks(self, forwards: list[Callable]) -> contextlib.AbstractContextManager[None]:
        return patched(dict(zip(map(self.block, self.blocks), forwards, strict=True)))

    def arguments(self, batch: int, index: int, hidden: Tensor) -> Arguments:
        """What block number `index` is called with for a batch whose hidden state is `hidden`."""
        args, kwargs = self._calls[batch][index]
        return ((), {**kwargs, "hidden_states": hidden}) if self._by_keyword else ((hidden, *args), kwargs)

    def _passed(self, block: nn.Module, i: int, arguments: Arguments) -> Tensor:
        with self.begun(i):
            output = self.step(block, arguments)
        if self.begun is not _from_the_start and bool(output.isnan().any()):  # what seemed not to be needed is
            output = self.step(block, arguments)
        return output

    def step(self, block: nn.Module, arguments: Arguments) -> Tensor:
        """The next hidden state, in the dtype of the last."""
        self.slack.give_back()
        args, kwargs = (cloned(each) for each in arguments)  # which a forward may write into
        with self.autocast():
            output = first_tensor(block(*args, **kwargs))
        return output.float()

    def tried(self, block: nn.Module, example: Arguments) -> Tensor | None:
        """What a block gives for an example; None where it refuses it: what is wrong with a network, and not with a
        single example or with NaN, shows when it is run as a whole."""
        try:
            return self.step(block, example)
        except Stop:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None

    @contextlib.contextmanager
    def tail(self, with_head: bool = True) -> Iterator[Callable[[Batch, Tensor], Any]]:
        """A function from (batch, last hidden state) to the network's output; the blocks are passed by.

        An output head of its own is not loaded where what it is given is all that is wanted.
        """
        held: list[Tensor] = []
        forwards = [lambda *args, **kwargs: self._wrap(held[0])] * len(self.blocks)

        def run(batch: Batch, hidden: Tensor) -> Any:
            held[:] = [hidden]
            return self.call(batch)

        with self._replaced_blocks(forwards), self.loaded(self.outside if with_head else self._before_head()):
            yield run

    @torch.no_grad()
    def _runs_fast(self, block: nn.Module, arguments: Arguments) -> bool:
        """Whether a block computes in bfloat16: what writes float32 into a part of a tensor, or fills with float32's
        least number, does not, and computes in float32.
        """
        try:
            self.step(block, arguments)
        except RuntimeError as error:
            refuse_shortage(error)
            return False
        return True

    def sweep(self, batches: list[Batch]) -> Iterator[tuple[str, nn.Module, list[Arguments]]]:
        """Each block, loaded, with the arguments of all batches; goes on with what the block then computes.

        At the end `last` holds the last block's hidden state of each batch. A network that is one block is not run.
        """
        reached = self.enter(batches)
        for index, name in enumerate(self.blocks):
            block = self.block(name)
            with self.loaded(self.names_in(name)):
                if index == 0 and self.fast and reached:
                    self.fast = self._runs_fast(block, reached[0])
                yield name, block, reached
                if not name:
                    return
                with torch.no_grad():
                    self.last = [self._passed(block, i, arguments) for i, arguments in enumerate(reached)]
                self.begun = _from_the_start
            if index + 1 < len(self.blocks):
                reached = [self.arguments(i, index + 1, hidden) for i, hidden in enumerate(self.last)]


def _from_the_start(_: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _untouched(hidden: Tensor, given: Tensor) -> bool:
    """Whether it is what was given, with the same values: a clone's, which nothing has been written to."""
    return hidden.data_ptr() == given.data_ptr() and hidden.shape == given.shape and not hidden._version


def _as_it_is(hidden: Tensor) -> Any:
    return hidden


def _in_a_tuple(hidden: Tensor) -> Any:
    return (hidden,)


def cloned(value: Any) -> Any:
    """Positional arguments, or those by name, with floats of their own."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {
        key: item.clone() if isinstance(item, Tensor) and item.is_floating_point() else item for key, item in items
    }
    return found if isinstance(value, dict) else tuple(found.values())


def hidden_of(arguments: Arguments) -> Tensor:
    """The hidden state among a block's arguments."""
    args, kwargs = arguments
    return args[0] if args else kwargs["hidden_states"]


def first_example(arguments: Arguments) -> Arguments:
    """The first example of a batch, by a block's arguments: of all tensors whose first axis counts examples."""
    n = n_examples(arguments)

    def first(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:1] if value.dim() and len(value) == n else value
        if type(value) in (tuple, list):
            return type(value)(first(each) for each in value)
        return {key: first(each) for key, each in value.items()} if type(value) is dict else value

    args, kwargs = arguments
    return first(args), first(kwargs)


def n_examples(arguments: Arguments) -> int:
    """How many examples a batch has, by a block's arguments."""
    args, kwargs = arguments
    return len(first_tensor((*args, *kwargs.values())))
