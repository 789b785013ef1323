"""The original network, run block by block: one block's weights in memory at a time, in float32.

Three sweeps. The first runs what stands before the blocks and notes with what each block is called (masks, position
embeddings). The second runs block after block over all batches. The third runs what follows the blocks, with each block
replaced by what the second found. What lies outside of blocks (tables, norms, head) stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from compressor.checkpoints import Checkpoint

Batch = dict[str, Tensor]
Calls = list[list[tuple[tuple, dict]]]


class _LastBlock(Exception):
    """Ends the first sweep: what follows the blocks is not needed there."""


def original_logits(checkpoint: Checkpoint, windows: np.ndarray) -> Iterator[np.ndarray]:
    """The original's logits, one window at a time: float32 (1, n, vocabulary), in order, for windows (n_windows, n)."""
    return original_outputs(checkpoint, ({"input_ids": window[None]} for window in windows))


def original_outputs(checkpoint: Checkpoint, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """The original's first output per batch, float32, in order.

    Args:
        batches: Arguments of its forward by name. A single one, unless it is input_ids, is given by position.
    """
    module = checkpoint.build()
    calls = [{name: torch.as_tensor(np.asarray(value)) for name, value in batch.items()} for batch in batches]
    blocks = repeated_blocks(module)
    _load(checkpoint, module, outside(module, blocks))
    recorded = _first_sweep(module, blocks, calls) if blocks else None
    if recorded is None:
        _load(checkpoint, module, [name for block in blocks for name in _names(module, block)])
        for call in calls:
            yield _array(_forward(module, call))
        return
    states = _second_sweep(checkpoint, module, blocks, recorded)
    for call, state in zip(calls, states, strict=True):
        with _replaced(blocks, [lambda *args, _state=state, **kwargs: _state for _ in blocks]):
            output = _array(_forward(module, call))
        yield output


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The children of the ModuleList that holds most weights, all of one class; none where there is no such list."""
    lists = [
        child for child in module.modules()
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(block) for block in child}) == 1
    ]  # fmt: skip
    if not lists:
        return []
    return list(max(lists, key=lambda found: sum(parameter.numel() for parameter in found.parameters())))


def outside(module: nn.Module, blocks: list[nn.Module]) -> list[str]:
    """Names of the weights and persistent buffers that are in no block."""
    inside = {name for block in blocks for name in _names(module, block)}
    return [name for name in module.state_dict(keep_vars=True) if name not in inside]


def _names(module: nn.Module, block: nn.Module) -> list[str]:
    prefix = next(name for name, child in module.named_modules() if child is block)
    return [f"{prefix}.{name}" for name in block.state_dict(keep_vars=True)]


def _load(checkpoint: Checkpoint, module: nn.Module, names: list[str]) -> None:
    checkpoint.materialise(module, names)
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() and not tensor.is_meta and tensor.dtype != torch.float32:
            tensor.data = tensor.data.float()


def _release(block: nn.Module) -> None:
    for child in block.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


@torch.no_grad()
def _forward(module: nn.Module, call: Batch) -> Tensor:
    if len(call) == 1 and "input_ids" not in call:
        return _first(module(*call.values()))
    cache = {"use_cache": False} if hasattr(getattr(module, "config", None), "use_cache") else {}
    return _first(module(**call, **cache))


def _first(output: Any) -> Tensor:
    """The first tensor of what a forward returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def _array(output: Tensor) -> np.ndarray:
    return output.float().numpy()


@contextmanager
def _replaced(blocks: list[nn.Module], forwards: list[Callable]) -> Iterator[None]:
    """Other forwards for blocks, which keep their attributes."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _first_sweep(module: nn.Module, blocks: list[nn.Module], calls: list[Batch]) -> Calls | None:
    """Per batch and block, the arguments it is called with; None when blocks are not called once each, in order.

    Some networks take a block's output as it is, others its element 0: the wrong one shows in the next block's input.
    """
    for wrap in (lambda tensor: tensor, lambda tensor: (tensor,)):
        recorded = [_record(module, blocks, call, wrap) for call in calls]
        if all(len(record) == len(blocks) for record in recorded):
            return recorded
    return None


def _record(module: nn.Module, blocks: list[nn.Module], call: Batch, wrap: Callable[[Tensor], Any]) -> list:
    record: list[tuple[tuple, dict]] = []

    def recorder(index: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(record) != index or not args or not isinstance(args[0], Tensor):
                record.clear()
                raise _LastBlock
            if record and args[0].shape != record[0][0][0].shape:
                raise _LastBlock
            record.append((args, kwargs))
            if index == len(blocks) - 1:
                raise _LastBlock
            return wrap(args[0])

        return forward

    with _replaced(blocks, [recorder(index) for index in range(len(blocks))]):
        try:
            _forward(module, call)
        except _LastBlock:
            return record
    return []


@torch.no_grad()
def _second_sweep(checkpoint: Checkpoint, module: nn.Module, blocks: list[nn.Module], recorded: Calls) -> list[Any]:
    """What the last block returns, per batch."""
    outputs: list[Any] = [record[0][0][0] for record in recorded]
    for index, block in enumerate(blocks):
        _load(checkpoint, module, _names(module, block))
        for batch, record in enumerate(recorded):
            args, kwargs = record[index]
            outputs[batch] = block(_first(outputs[batch]), *args[1:], **kwargs)
            record[index] = ((), {})
        _release(block)
    return outputs
