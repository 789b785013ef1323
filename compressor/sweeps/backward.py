"""What streamed backward passes share: block inputs in scratch files, the head, one block's forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.core.outputs import named_outputs
from compressor.graph.blocks import on_input, patched
from compressor.learning.head import Head, Logits
from compressor.ops.draws import draw
from compressor.sweeps.network import Network, Stop, head_of

_POSITIONS = 128
"""Whose logits are there at a time."""


def head_input(network: Network, call: Callable[[], Any]) -> Tensor:
    """What the head is given while `call` runs the network, which ends there."""
    caught: list[Tensor] = []

    def catch(given: Tensor) -> None:
        caught.append(given)
        raise Stop

    head = head_of(network.module)
    assert head is not None
    with on_input(head, catch), contextlib.suppress(Stop), network.autocast():
        call()
    return caught[0]


@torch.no_grad()
def find_logits(network: Network, call: Callable[[], Any]) -> None:
    """Sets `network.logits` to what the network makes of its head's outputs in `call`, which runs it."""
    head = head_of(network.module)
    assert head is not None

    def ends(values: Tensor) -> Tensor:
        given = values.to(network.device).repeat(1, -(-head.out_features // len(values)))[None, :, : head.out_features]
        with patched({head: lambda *args, **kwargs: given}):
            logits = named_outputs(call()).get("logits")
        return torch.empty(0) if logits is None else logits.float().flatten()[: len(values)].cpu()

    network.logits = Logits.measured(ends)


@torch.no_grad()
def label_gradient(
    network: Network, rows: Tensor, labels: Tensor | None, generator: torch.Generator | None = None
) -> Tensor:
    """∂ Σ −log p(y) / ∂rows for head inputs (tokens, width), a few rows at a time.

    (softmax(xWᵀ + b) − onehot(y))·W, and by the slope of `network.logits` where the head's outputs are not the logits.
    Labels (tokens,) that are negative count nothing; without labels they are drawn from p.
    """
    found = head_of(network.module)
    assert found is not None
    dtype = torch.bfloat16 if network.fast else torch.float32
    head = Head(found.weight.to(dtype), found.bias, network.logits or Logits())
    matrix, parts = head.table, []
    for start in range(0, len(rows), _POSITIONS):
        logits = head(rows[start : start + _POSITIONS].to(dtype))
        probability = logits.softmax(-1)
        if labels is None:
            label = draw(probability, torch.rand(len(probability), 1, generator=generator))
        else:
            label = labels[start : start + _POSITIONS].unsqueeze(1).to(rows.device)
            probability.masked_fill_(label < 0, 0.0)
        counted = -(label >= 0).float()
        probability.scatter_add_(1, label.clamp_min(0), counted)
        parts.append((head.logits.through(probability, logits).to(dtype) @ matrix).float())
    return torch.cat(parts)


class HiddenFiles:
    """Hidden states of each block's inputs in mapped files, in the precision that blocks compute in."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder, self.dtype = folder, torch.bfloat16 if network.fast else torch.float32
        self.device = network.device
        self.files: list[Path] = []
        self.shapes: list[torch.Size] = []

    def add(self, hidden: list[Tensor]) -> None:
        """The inputs of the next block, a tensor per batch."""
        path = self.folder / f"hidden-{len(self.files)}.bin"
        self.shapes = [part.shape for part in hidden]
        with path.open("wb") as file:  # not through the mapping: on a full disk that ends the process without a word
            for part in hidden:
                file.write(part.to(self.dtype).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.files.append(path)

    def read(self, block: int) -> Iterator[Tensor]:
        """The inputs of a block, float32, one batch in memory at a time."""
        for part in self._map(self.files[block]):
            yield part.to(self.device, torch.float32, copy=True)

    def close(self) -> None:
        for path in self.files:
            path.unlink(missing_ok=True)

    def _map(self, path: Path) -> list[Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        flat = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=self.dtype)
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


def gradient_of(tensor: Tensor) -> Tensor:
    """What a backward pass left at a tensor that it reached."""
    assert tensor.grad is not None
    return tensor.grad


def back_through(
    network: Network, index: int, stored: HiddenFiles, upstream: list[Tensor], each: Callable[[int], None]
) -> None:
    """Block number `index`, loaded, forward and backward for each batch; `each` is told after it.

    `upstream` holds ∂ℓ/∂(output) per batch, and at the end ∂ℓ/∂(input).
    """
    block = network.block(network.blocks[index])
    for i, hidden in enumerate(stored.read(index)):
        hidden.requires_grad_(True)
        with torch.enable_grad():
            output = network.step(block, network.arguments(i, index, hidden))
        output.backward(upstream[i])
        upstream[i] = gradient_of(hidden)
        each(i)
