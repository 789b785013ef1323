"""The survey: one forward and one streamed backward of the untouched network, before anything is encoded.

It finds how much each token matters to each layer: t = mean over outputs of (∂ℓ/∂y)², with ℓ the loss on labels drawn
from the network's own predictions, which makes Σ t·xxᵀ a Kronecker-factored estimate of the Fisher information
(Martens & Grosse, arXiv 1503.05671; weighted Hessians for quantisation: GuidedQuant, arXiv 2505.07004). It also
collects the second moment of the head's input. Memory is one block and its activations; block inputs lie in a scratch
file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.errors import CheckpointError
from compressor.graph.blocks import layers
from compressor.streaming import Batch, Network, _Stop, hidden_of

_POSITIONS = 512
LARGEST_IMPORTANCE = 50.0


@dataclass
class Survey:
    """What the untouched network showed.

    importance    per layer weight, (tokens,): mean 1, at most 50; empty where no gradients were asked for
    channels      per block, (width,): how much each channel of its output matters, mean 1; under the block's own name
                  `importance` has how much each token does
    head_moment   mean xxᵀ of the output head's input (in, in); None for a network without a language-model head
    """

    importance: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    head_moment: Tensor | None = None

    def pack(self) -> dict[str, Tensor]:
        """All of it as named tensors, for a file."""
        found = {f"importance {name}": tensor.contiguous() for name, tensor in self.importance.items()}
        found |= {f"channels {name}": tensor.contiguous() for name, tensor in self.channels.items()}
        return found if self.head_moment is None else found | {"head moment": self.head_moment}

    @classmethod
    def unpack(cls, stored: dict[str, Tensor]) -> Survey:
        """The inverse of `pack`."""
        kinds: dict[str, dict[str, Tensor]] = {"importance": {}, "channels": {}, "head": {}}
        for key, tensor in stored.items():
            kind, _, name = key.partition(" ")
            kinds[kind][name] = tensor
        return cls(kinds["importance"], kinds["channels"], kinds["head"].get("moment"))


def head_of(module: nn.Module) -> nn.Module | None:
    """The output head of a language model, or None."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find else None
    return head if isinstance(head, nn.Linear) else None


def survey(
    network: Network, batches: list[Batch], scratch: Path, gradients: bool, generator: torch.Generator,
    advance: Callable[[], None] = lambda: None,
) -> Survey:  # fmt: skip
    """Runs the untouched network over `batches`; `advance` is called once per block and direction."""
    found = Survey()
    if head_of(network.module) is None or network.blocks == [""]:
        return found
    stored = _Scratch(scratch, gradients, torch.bfloat16 if network.fast else torch.float32)
    for _, _, reached in network.sweep(batches):
        stored.add([hidden_of(arguments) for arguments in reached])
        advance()
    upstream = _through_head(network, batches, network.last, found, gradients, generator)
    if gradients:
        _backward(network, stored, upstream, found, advance)
    stored.close()
    return found


@torch.no_grad()
def head_inputs(network: Network, batches: list[Batch], advance: Callable[[], None]) -> list[Tensor]:
    """The untouched network's head inputs, bfloat16 (tokens, width) per batch: from them its logits are one product."""
    for _ in network.sweep(batches):
        advance()
    rows = []
    with network.tail() as run:
        for batch, state in zip(batches, network.last, strict=True):
            rows.append(_head_input(network, run, batch, state).detach().flatten(0, -2).to(torch.bfloat16))
    return rows


def _head_input(network: Network, run: Callable[[Batch, Tensor], object], batch: Batch, state: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple) -> None:
        caught.append(args[0])
        raise _Stop

    handle = head_of(network.module).register_forward_pre_hook(catch)
    try:
        with contextlib.suppress(_Stop), network.autocast():
            run(batch, state)
    finally:
        handle.remove()
    return caught[0]


class _Scratch:
    """Hidden states of each block's inputs in mapped files, in the precision that blocks compute in."""

    def __init__(self, folder: Path, wanted: bool, dtype: torch.dtype) -> None:
        self.folder, self.wanted, self.dtype, self.files, self.shapes = folder, wanted, dtype, [], []

    def add(self, hidden: list[Tensor]) -> None:
        if not self.wanted:
            return
        path = self.folder / f"hidden-{len(self.files)}.bin"
        self.shapes = [part.shape for part in hidden]
        flat = torch.cat([part.flatten() for part in hidden]).to(self.dtype)
        torch.from_file(str(path), shared=True, size=flat.numel(), dtype=self.dtype).copy_(flat)
        self.files.append(path)

    def read(self, block: int) -> list[Tensor]:
        size = sum(shape.numel() for shape in self.shapes)
        flat = torch.from_file(str(self.files[block]), shared=True, size=size, dtype=self.dtype)
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.to(torch.float32, copy=True).view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def close(self) -> None:
        for path in self.files:
            path.unlink(missing_ok=True)


def _through_head(
    network: Network, batches: list[Batch], hidden: list[Tensor], found: Survey, gradients: bool,
    generator: torch.Generator,
) -> list[Tensor]:  # fmt: skip
    """The head's second moment; with gradients, ∂ℓ/∂(last hidden state) per batch."""
    upstream: list[Tensor] = []
    n_rows = 0
    with network.tail() as run:
        head = head_of(network.module)
        for batch, state in zip(batches, hidden, strict=True):
            state = state.detach().requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                caught = _head_input(network, run, batch, state)
            rows = caught.detach().float().flatten(0, -2)
            moment = rows.T @ rows
            found.head_moment = moment if found.head_moment is None else found.head_moment.add_(moment)
            n_rows += len(rows)
            if gradients:
                caught.backward(_label_gradient(rows, head.weight, network, generator).view_as(caught))
                upstream.append(state.grad)
    found.head_moment.div_(n_rows)
    return upstream


@torch.no_grad()
def _label_gradient(rows: Tensor, weight: Tensor, network: Network, generator: torch.Generator) -> Tensor:
    """∂ Σ −log p(y) / ∂rows for labels y drawn from p: (softmax(xWᵀ) − onehot(y))·W, a few rows at a time."""
    dtype = torch.bfloat16 if network.fast else torch.float32
    matrix, parts = weight.to(dtype), []
    for part in rows.split(_POSITIONS):
        probability = functional.linear(part.to(dtype), matrix).float().softmax(-1)
        label = torch.multinomial(probability, 1, generator=generator)
        probability.scatter_add_(1, label, torch.full_like(label, -1.0, dtype=torch.float32))
        parts.append((probability.to(dtype) @ matrix).float())
    return torch.cat(parts)


def _backward(
    network: Network, stored: _Scratch, upstream: list[Tensor], found: Survey,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Back through the blocks, each reloaded and recomputed; fills `found.importance`."""
    for index in reversed(range(len(network.blocks))):
        name = network.blocks[index]
        block = network.block(name)
        squares = [part.flatten(0, -2).pow(2) for part in upstream]
        found.importance[name] = _shares(torch.cat([part.mean(1) for part in squares]), name, network)
        found.channels[name] = _shares(torch.stack([part.sum(0) for part in squares]).sum(0), name, network)
        del squares
        with network.loaded(network.names_in(name)):
            collected: dict[str, list[Tensor]] = {}
            handles = [
                layer.register_forward_hook(_collector(collected.setdefault(weight, [])))
                for weight, layer in layers(block, f"{name}.").items()
            ]
            for i, hidden in enumerate(stored.read(index)):
                hidden.requires_grad_(True)
                with torch.enable_grad():
                    output = network.step(block, network.arguments(i, index, hidden))
                output.backward(upstream[i])
                upstream[i] = hidden.grad
            for handle in handles:
                handle.remove()
        for weight, parts in collected.items():
            found.importance[weight] = _shares(torch.cat(parts), weight, network)
        advance()


def _shares(values: Tensor, name: str, network: Network) -> Tensor:
    """Relative to their mean, at most 50."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{network.checkpoint.path}: the gradient at '{name}' is not finite")
    return (values / values.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=LARGEST_IMPORTANCE)


def _collector(into: list[Tensor]):
    def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
        output.register_hook(lambda gradient: into.append(gradient.float().pow(2).mean(-1).flatten()))

    return hook


def load_gradients(folder: Path, block: str) -> dict[str, Tensor]:
    """The gathered gradients (out, in) of a block's weights, by name."""
    return load_file(folder / f"gradients-{block or 'network'}.safetensors")
