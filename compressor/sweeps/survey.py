"""The survey: forwards and streamed backwards of the untouched network, before anything is encoded.

It finds how much each token matters to each layer: t = mean over outputs of (∂ℓ/∂y)², with ℓ the loss on labels drawn
from the network's own predictions, which makes Σ t·xxᵀ a Kronecker-factored estimate of the Fisher information
(Martens & Grosse, arXiv 1503.05671; weighted Hessians for quantisation: GuidedQuant, arXiv 2505.07004). It also
collects the second moment of the head's input: a head that is the embeddings' table too comes before all blocks. Asked
for the weights' own gradients, it gathers Σ|g| or √Σg² of each over sequences, a backward pass per sequence, and leaves
them in a file per block (GBLM, arXiv 2311.04902). Memory is one block and its activations; block inputs lie in a
scratch file.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.checkpoints.experts import routed
from compressor.core.batch import Batch
from compressor.core.device import HOST
from compressor.core.errors import CheckpointError
from compressor.core.log import LOGGER
from compressor.graph.blocks import layers
from compressor.ops.sums import mean
from compressor.sweeps.backward import (
    HiddenFiles,
    back_through,
    find_logits,
    gradient_of,
    head_input,
    head_of,
    label_gradient,
)
from compressor.sweeps.gradients import GradientFiles, gather_gradients
from compressor.sweeps.network import Network, hidden_of

LARGEST_IMPORTANCE = 50.0


@dataclass
class Survey:
    """What the untouched network showed.

    importance    per layer weight, (tokens,): mean 1, at most 50; empty where no gradients were asked for
    channels      per block, (width,): how much each channel of its output matters, mean 1; under the block's own name
                  `importance` has how much each token does
    head_moment   mean xxᵀ of the output head's input (in, in); None for a network without a language-model head
    scales        per layer weight, the mean of t before importance is relative to it; under "" that of the first
                  block's input
    """

    importance: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    head_moment: Tensor | None = None
    scales: dict[str, float] = field(default_factory=dict)

    def pack(self) -> dict[str, Tensor]:
        """All of it as named tensors on the host, for a file."""
        host = self.to(HOST)
        found = {f"importance {name}": tensor.contiguous() for name, tensor in host.importance.items()}
        found |= {f"channels {name}": tensor.contiguous() for name, tensor in host.channels.items()}
        found |= {f"scales {name}": torch.tensor(value, dtype=torch.float64) for name, value in self.scales.items()}
        return found if host.head_moment is None else found | {"head moment": host.head_moment}

    def to(self, device: str | torch.device) -> Survey:
        """The same, on a device."""
        importance, channels = (
            {name: each.to(device) for name, each in found.items()} for found in (self.importance, self.channels)
        )
        moment = None if self.head_moment is None else self.head_moment.to(device)
        return Survey(importance, channels, moment, self.scales)

    @classmethod
    def unpack(cls, stored: dict[str, Tensor]) -> Survey:
        """The inverse of `pack`."""
        kinds: dict[str, dict[str, Tensor]] = {"importance": {}, "channels": {}, "head": {}, "scales": {}}
        for key, tensor in stored.items():
            kind, _, name = key.partition(" ")
            kinds[kind][name] = tensor
        scales = {name: float(value) for name, value in kinds["scales"].items()}
        return cls(kinds["importance"], kinds["channels"], kinds["head"].get("moment"), scales)


_UNKNOWN = (
    "%s: what it makes of its head's outputs is neither a scale nor a soft cap; importance is measured as if they were "
    "its logits"
)


def survey(
    network: Network, batches: list[Batch], scratch: Path, gradients: bool, generator: torch.Generator,
    advance: Callable[[], None] = lambda: None, weight_gradients: Literal[1, 2] | None = None,
    wanted: Container[str] | None = None,
) -> Survey:  # fmt: skip
    """Runs the untouched network over `batches`; `advance` is called once per block and direction.

    Args:
        gradients: Whether tokens and channels get their importance. That and the head's moment are of language models
            with blocks only.
        weight_gradients: The p of Σ|g|ᵖ per weight, which `load_gradients` then reads from the folder `scratch`; two
            directions more. Of the weights named in `wanted`, or all.
    """
    found = Survey()
    if head_of(network.module) is not None and network.blocks != [""]:
        _importance(network, batches, scratch, gradients, generator, advance, found)
    if weight_gradients is not None:
        gather_gradients(network, batches, GradientFiles(scratch, weight_gradients, wanted), generator, advance)
    return found


def _importance(
    network: Network, batches: list[Batch], scratch: Path, gradients: bool, generator: torch.Generator,
    advance: Callable[[], None], found: Survey,
) -> None:  # fmt: skip
    """Fills `found`."""
    stored = HiddenFiles(scratch, network)
    try:
        for name, _, reached in network.sweep(batches):
            if not name:  # only by running it was found to have no blocks
                return
            if gradients:
                stored.add([hidden_of(arguments) for arguments in reached])
            advance()
        upstream = _through_head(network, batches, network.last, found, gradients, generator)
        if gradients:
            _backward(network, stored, upstream, found, advance)
    finally:
        stored.close()


@torch.no_grad()
def head_inputs(network: Network, batches: list[Batch], advance: Callable[[], None]) -> list[Tensor]:
    """The untouched network's head inputs, bfloat16 (tokens, width) per batch: from them its logits are one product.

    On the host, wherever the network is.
    """
    for _ in network.sweep(batches):
        advance()
    rows = []
    with network.tail() as run:
        for batch, state in zip(batches, network.last, strict=True):
            caught = head_input(network, lambda batch=batch, state=state: run(batch, state))
            rows.append(caught.detach().flatten(0, -2).to(torch.bfloat16).cpu())
    return rows


@torch.no_grad()
def measure_logits(network: Network, batch: Batch) -> None:
    """Sets `network.logits` to what the network makes of its head's outputs, by what reaches the first block alone."""
    for name, _, reached in network.sweep([batch]):
        if name:
            hidden = hidden_of(reached[0])
            with network.tail() as run:
                find_logits(network, lambda hidden=hidden: run(batch, hidden))
        return


def _through_head(
    network: Network, batches: list[Batch], hidden: list[Tensor], found: Survey, gradients: bool,
    generator: torch.Generator,
) -> list[Tensor]:  # fmt: skip
    """The head's second moment; with gradients, ∂ℓ/∂(last hidden state) per batch."""
    if not gradients:
        found.head_moment = head_moment(network, batches, hidden)
        return []
    upstream: list[Tensor] = []
    sums, n_rows = torch.zeros(()), 0
    with network.tail() as run:
        find_logits(network, lambda: run(batches[0], hidden[0]))
        if network.logits is None:
            LOGGER.warning(_UNKNOWN, network.checkpoint.path)
        for batch, state in zip(batches, hidden, strict=True):
            state = state.detach().requires_grad_(True)
            with torch.enable_grad():
                caught = head_input(network, lambda batch=batch, state=state: run(batch, state))
            rows = caught.detach().float().flatten(0, -2)
            sums, n_rows = rows.T @ rows + sums, n_rows + len(rows)
            caught.backward(label_gradient(network, rows, None, generator).view_as(caught))
            upstream.append(gradient_of(state))
    found.head_moment = sums.div_(n_rows)
    return upstream


@torch.no_grad()
def head_moment(network: Network, batches: list[Batch], hidden: list[Tensor]) -> Tensor:
    """Mean xxᵀ (in, in) of what the output head is given behind the last block's hidden states."""
    sums, n_rows = torch.zeros(()), 0
    with network.tail(with_head=False) as run:
        for batch, state in zip(batches, hidden, strict=True):
            caught = head_input(network, lambda batch=batch, state=state: run(batch, state))
            rows = caught.float().flatten(0, -2)
            sums, n_rows = rows.T @ rows + sums, n_rows + len(rows)
    return sums.div_(n_rows)


def _backward(
    network: Network, stored: HiddenFiles, upstream: list[Tensor], found: Survey,
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
            back_through(network, index, stored, upstream, lambda _: None)
            for handle in handles:
                handle.remove()
        apart = routed(block, f"{name}.")
        for weight, parts in collected.items():
            values = torch.cat(parts) if parts else torch.zeros(0)  # of a layer that the block does not call
            found.scales[weight] = float(mean(values)) if len(values) else 0.0
            if parts and weight not in apart:  # which tokens reach an expert differs once weights are encoded
                found.importance[weight] = _shares(values, weight, network)
        advance()
    found.scales[""] = float(torch.stack([mean(part.pow(2)) for part in upstream]).mean())


def _shares(values: Tensor, name: str, network: Network) -> Tensor:
    """Relative to their mean, at most 50."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{network.checkpoint.path}: the gradient at '{name}' is not finite")
    return (values / mean(values).clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=LARGEST_IMPORTANCE)


def _collector(into: list[Tensor]):
    def hook(_: nn.Module, __: tuple, output: object) -> None:
        if isinstance(output, Tensor):  # routers are linears that give more
            output.register_hook(lambda gradient: into.append(gradient.float().pow(2).mean(-1).flatten()))

    return hook
