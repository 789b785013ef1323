"""The second moments of what reaches the layers of a block, and in which order they are gathered."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor.checkpoints.experts import routed
from compressor.graph.blocks import (
    Stage,
    geometry,
    layers,
    layout_of,
    on_input,
    stages,
    unfolded_pieces,
    unfolds,
    weight_of,
)
from compressor.ops.gram import add_gram, mirror
from compressor.plan.workload import UNFOLDED_AT_ONCE
from compressor.sweeps.drift import Drift
from compressor.sweeps.network import Arguments, Network, Stop, first_example

_NUMBER, _numbers = "_compressor_number", itertools.count()
LIMIT = 512_000_000
"""Bytes of second moments that are gathered at once of layers that have one each."""


class Before(Protocol):
    """What comes before layers and is settled, so that forwards need not compute it: `Held` of blocks, `Settled`."""

    def advance(self, layers: Sequence[nn.Module]) -> None: ...

    def note(self, rows: Tensor) -> None: ...

    def begun(self, i: int) -> contextlib.AbstractContextManager[None]: ...

    @property
    def passes(self) -> bool: ...

    def distrust(self) -> None: ...


@torch.no_grad()
def layer_stages(network: Network, block: nn.Module, prefix: str, arguments: Arguments) -> list[Stage]:
    """The block's encodable layers in stages, by running one batch."""
    order: list[tuple[str, tuple[int, int]]] = []
    found = layers(block, prefix)

    def note(name: str) -> Callable[[Tensor], None]:
        def look(given: Tensor) -> None:
            if not hasattr(given, _NUMBER):  # no tensor is kept alive for its identity
                setattr(given, _NUMBER, next(_numbers))
            order.append((name, (getattr(given, _NUMBER), given._version)))  # it may be written to in between

        return look

    handles = [on_input(module, note(name)) for name, module in found.items() if not isinstance(module, nn.Embedding)]
    apart = routed(block, prefix)
    try:
        if apart or network.tried(block, first_example(arguments)) is None:  # of all, some reach each expert
            order.clear()
            network.step(block, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return _side_by_side(stages(order), apart)


def _side_by_side(found: list[Stage], apart: Collection[str]) -> list[Stage]:
    """The stages; the experts of a mixture are gone through together, all first products and then all second ones."""
    joined: list[Stage] = []
    together: dict[tuple[str, str], Stage] = {}
    for stage in found:
        if not set(stage.names) <= set(apart):
            joined.append(stage)
            continue
        mixture, _, layer, _ = stage.names[0].rsplit(".", 3)
        if (mixture, layer) in together:
            together[mixture, layer].names += stage.names
        else:
            together[mixture, layer] = Stage(stage.names, stage.calls, share=False)
            joined.append(together[mixture, layer])
    return joined


def groups_of(stage: Stage, names: Collection[str], found: Mapping[str, nn.Module]) -> list[list[str]]:
    """Those of a stage's layers that are named, in groups whose moments are gathered by running the block once.

    They make the same rows of an input that they share; or they are as many as LIMIT has room for.
    """
    groups: dict[tuple, list[str]] = {}
    held = 0
    for name in (name for name in stage.names if name in names):
        module, layout = found[name], layout_of(found[name])
        assert layout is not None
        if stage.share:
            key: tuple = (unfolds(module), geometry(module), layout.transposed)
        else:
            held += 4 * weight_of(module).shape[1] ** 2
            key = (held // LIMIT,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def moments_of(
    network: Network, block: nn.Module, found: Mapping[str, nn.Module], names: list[str], stage: Stage,
    reached: list[Arguments], importance: Mapping[str, Tensor],
    held: Before | None = None, drift: Drift | None = None,
) -> dict[str, tuple[Tensor, int]]:  # fmt: skip
    """H and the number of tokens of each layer of a group, see `second_moments`; `drift` where they share an input.

    What is settled before them is `held`, and not computed again; but where NaN comes of that all of it is.
    """
    moments = _gathered(network, block, found, names, stage, reached, importance, held, drift)
    spoilt = any(bool(moment.diagonal().isnan().any()) for moment, _ in moments.values())
    passing = [each for each in (held, drift) if each is not None and each.passes]
    if not passing or (not spoilt and (drift is None or drift.is_number())):
        return moments
    for each in passing:
        each.distrust()
    if drift is not None:
        drift.forget()
    return _gathered(network, block, found, names, stage, reached, importance, held, drift)


def _gathered(
    network: Network, block: nn.Module, found: Mapping[str, nn.Module], names: list[str], stage: Stage,
    reached: list[Arguments], importance: Mapping[str, Tensor], held: Before | None, drift: Drift | None,
) -> dict[str, tuple[Tensor, int]]:  # fmt: skip
    once = [found[name] for name in stage.names] if stage.share and stage.calls == 1 else []
    if held is not None:
        held.advance(once)
    if drift is not None:
        drift.begin(stage.names if once else ())
    if stage.share:
        shared, n_tokens = second_moments(network, block, found, names, stage.calls, reached, importance, held, drift)
        return {name: (moment, n_tokens) for name, moment in shared.items()}
    widths = {name: weight_of(found[name]).shape[1] for name in names}
    sums = {name: torch.zeros(width, width, device=network.device) for name, width in widths.items()}
    counts = dict.fromkeys(names, 0)

    def watching(name: str) -> Callable[[Tensor], None]:
        def watch(given: Tensor) -> None:
            with torch.autocast(network.device.type, enabled=False):
                for rows in unfolded_pieces(found[name], given, UNFOLDED_AT_ONCE):
                    add_gram(sums[name], rows)
                    counts[name] += len(rows)

        return watch

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name in names:
            hooks.enter_context(on_input(found[name], watching(name)))
        for i, arguments in enumerate(reached):
            with contextlib.nullcontext() if held is None else held.begun(i):
                network.step(block, arguments)
    return {name: (_mean(total, counts[name]), counts[name]) for name, total in sums.items()}


def _mean(total: Tensor, n: int) -> Tensor:
    """The lower half of a sum of n as a whole mean, in place; where n is 0, every input counts alike."""
    return mirror(total.div_(n) if n else total.fill_diagonal_(1))


@torch.no_grad()
def second_moments(
    network: Network,
    block: nn.Module,
    found: Mapping[str, nn.Module],
    names: list[str],
    calls: int,
    reached: list[Arguments],
    importance: Mapping[str, Tensor],
    held: Before | None = None,
    drift: Drift | None = None,
) -> tuple[dict[str, Tensor], int]:
    """H = mean over tokens of t·xxᵀ (in, in) per layer, t the importance of a token for it or 1; and how many tokens.

    Where there are none, as with an expert that no token is sent to, every input counts alike. The layers share their
    input, so that without importance they share one H. A forward begins after what
    is `held`, and ends at the last call.
    """
    sums: dict[str, Tensor] = {}
    counts = {"tokens": 0, "calls": 0}
    lead = found[names[0]]
    weighted = [name for name in names if name in importance]

    def watch(given: Tensor) -> None:
        if held is not None:
            held.note(given)
        with torch.autocast(network.device.type, enabled=False):
            for rows in unfolded_pieces(lead, given, UNFOLDED_AT_ONCE):
                original = None if drift is None else drift.next_rows(rows)
                for name in weighted or names[:1]:
                    seen, token = rows, None
                    if name in importance:
                        token = importance[name][counts["tokens"] : counts["tokens"] + len(rows)]
                        seen = rows * token.sqrt().unsqueeze(1)
                    if drift is not None and original is not None:
                        drift.add(name, original, rows, token)
                    add_gram(sums.setdefault(name, torch.zeros(seen.shape[1], seen.shape[1], device=seen.device)), seen)
                counts["tokens"] += len(rows)
        counts["calls"] += 1
        if counts["calls"] == calls:
            raise Stop

    with on_input(lead, watch):
        for i, arguments in enumerate(reached):
            counts["calls"] = 0
            if drift is not None:
                drift.batch(i, names[0], calls)
            with contextlib.nullcontext() if held is None else held.begun(i), contextlib.suppress(Stop):
                network.step(block, arguments)
    for total in sums.values():
        _mean(total, counts["tokens"])
    shared = next(iter(sums.values()))
    return {name: sums.get(name, shared) for name in names}, counts["tokens"]
