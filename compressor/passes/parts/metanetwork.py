"""A metanetwork: a network over graphs of channels that rewrites the weights of another, and its file.

Liu, Wang and Zhang, "Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning",
arXiv 2506.12041; written from a description of its code. A node is a channel with the eight numbers of two batch norms,
an edge a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.channels import ChannelGraph, ChannelLayer, ChannelNorm, Kernels
from compressor.core.errors import CheckpointError, RecipeError
from compressor.core.files import whole

FEATURES = 8
"""Of a node: γ, β, mean and variance of its norm, and of its shortcut's."""
SMALLEST_VARIANCE = 1e-5
"""Of messages; below it their standard deviation counts as 0."""
FORMAT = "metanetwork 1"
_LAYERS, _WIDTH = 64, 1024
"""What a file may ask for at most."""


@dataclass(frozen=True)
class Shape:
    """What a metanetwork is.

    layers   of message passing
    width    numbers of a node or an edge between them
    share    ρ: how much of what it says is added to a weight
    height, breadth   of the largest kernel that it reads
    adds     whether the networks it was trained on have sums
    """

    layers: int = 4
    width: int = 16
    share: float = 0.01
    height: int = 3
    breadth: int = 3
    adds: bool = True


class Metanetwork(nn.Module):
    """Nodes and edges of a graph to new ones, each the old ones and a share of what message passing says.

    trained_on   fingerprints of the architectures
    """

    def __init__(self, shape: Shape, trained_on: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.shape, self.trained_on = shape, trained_on
        width, kernel = shape.width, shape.height * shape.breadth
        self.read_nodes, self.read_edges = nn.Linear(FEATURES, width), nn.Linear(kernel, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(shape.layers))
        self.write_nodes, self.write_edges = _decoder(width, FEATURES), _decoder(width, kernel)

    def forward(self, nodes: Tensor, edges: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """New nodes (n, 8) and edges (m, height · breadth).

        Args:
            nodes, edges: Of the same shapes.
            pairs: LongTensor (2, m), source and target of each edge.
        """
        h, e = self.read_nodes(nodes), self.read_edges(edges)
        for layer in self.layers:
            h, e = layer(h, e, pairs)
        share = self.shape.share
        return nodes + share * self.write_nodes(h), edges + share * self.write_edges(e)

    def rewritten(self, graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's tensors that change, by name: differentiable in this metanetwork's parameters.

        Args:
            graph: Of the network.
            tensors: All of its parameters and buffers by name.
        """
        window = self.shape.height, self.shape.breadth
        nodes, edges = self(nodes_of(graph, tensors), edges_of(graph, tensors, window), graph.pairs())
        return written(graph, tensors, nodes, edges, window)

    def refuse(self, graph: ChannelGraph, title: str) -> None:
        """Refuses networks of another family than it was trained on.

        Raises:
            CheckpointError: It is one; names what differs.
        """
        height, breadth = graph.window
        wrong = None
        if height > self.shape.height or breadth > self.shape.breadth:
            largest = f"{self.shape.height}×{self.shape.breadth}"
            wrong = f"it has kernels of {height}×{breadth}, and those were up to {largest}"
        elif graph.adds != self.shape.adds:
            wrong = "it has residual sums, and those had none" if graph.adds else "it has no sums, and those had some"
        if wrong:
            raise CheckpointError(
                f"{title}: is of another family than the networks that the metanetwork was trained on: {wrong}; train "
                "one on networks like this one, by scripts/metatrain.py"
            )

    def knows(self, graph: ChannelGraph) -> bool:
        """Whether it was trained on this very architecture."""
        return graph.fingerprint() in self.trained_on


class _Layer(nn.Module):
    """One round of messages, forwards and backwards along the edges with the same weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.source, self.target = _activated(width), _activated(width)
        self.edge_source, self.edge_target = _activated(width), _activated(width)
        self.combine = nn.Linear(4 * width, width)
        self.flip: Tensor
        self.register_buffer("flip", torch.cat([torch.ones(width // 2), -torch.ones(width - width // 2)]), False)

    def forward(self, h: Tensor, e: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.layer_norm(h, h.shape[1:])
        source, target, edge_source, edge_target = (
            each(x) for each in (self.source, self.target, self.edge_source, self.edge_target)
        )
        (s, t), back = pairs, e * self.flip
        onwards = aggregate(target[t] * source[s] * e, t, len(h))
        backwards = aggregate(target[s] * source[t] * back, s, len(h))
        changed = edge_source[s] * edge_target[t] * e + self.flip * (edge_source[t] * edge_target[s] * back)
        return h + self.combine(onwards) + self.combine(backwards), e + changed


def _activated(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU())


def _decoder(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs))


def aggregate(messages: Tensor, target: Tensor, n: int) -> Tensor:
    """Mean, standard deviation, maximum and minimum of each node's messages, (n, 4 · width); 0 where there are none.

    Args:
        messages: (m, width).
        target: LongTensor (m,), the node that each is for.
    """
    count = torch.zeros(n, dtype=messages.dtype).index_add_(0, target, torch.ones(len(target), dtype=messages.dtype))
    count = count.clamp_min(1).unsqueeze(1)
    empty = torch.zeros(n, messages.shape[1], dtype=messages.dtype)
    mean = empty.index_add(0, target, messages) / count
    variance = empty.index_add(0, target, (messages - mean[target]).square()) / count
    spread = variance.clamp_min(SMALLEST_VARIANCE).sqrt().masked_fill(variance <= SMALLEST_VARIANCE, 0.0)
    index = target.unsqueeze(1).expand_as(messages)
    largest = empty.scatter_reduce(0, index, messages, "amax", include_self=False)
    smallest = empty.scatter_reduce(0, index, messages, "amin", include_self=False)
    return torch.cat([mean, spread, largest, smallest], 1)


def nodes_of(graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> Tensor:
    """(nodes, 8): γ, β, mean, variance, and those of a shortcut's norm; 1, 0, 0, 1 where there is none."""
    found = []
    for layer in graph.layers:
        columns = [*_columns(layer, layer.norm, tensors), *_columns(layer, layer.other, tensors)]
        for name, place in ((layer.bias, 1), (layer.other_bias, 5)):
            if name:
                columns[place] = tensors[name].float()
        found.append(torch.stack(columns, 1))
    return torch.cat(found)


def _columns(layer: ChannelLayer, norm: ChannelNorm | None, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    names = ("", "", "", "") if norm is None else (norm.weight, norm.bias, norm.mean, norm.variance)
    usual = torch.ones(layer.size), torch.zeros(layer.size), torch.zeros(layer.size), torch.ones(layer.size)
    return [tensors[name].float() if name else each for name, each in zip(names, usual, strict=True)]


def edges_of(graph: ChannelGraph, tensors: Mapping[str, Tensor], window: tuple[int, int]) -> Tensor:
    """(edges, height · width): kernels, smaller ones with zeros around them; what is passed on has 1 in the middle."""
    found = []
    for kernels in graph.kernels:
        if kernels.weight:
            values = tensors[kernels.weight].float().reshape(-1, *kernels.window)
        else:
            values = torch.ones(graph.layers[kernels.target].size, 1, 1)
        found.append(functional.pad(values, _around(kernels, window)).flatten(1))
    return torch.cat(found)


def written(
    graph: ChannelGraph, tensors: Mapping[str, Tensor], nodes: Tensor, edges: Tensor, window: tuple[int, int]
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors that nodes and edges say: weights, γ, β and biases. Statistics of norms are not read back.

    Args:
        tensors: Of the network, by name, for their shapes.
        nodes, edges: As `nodes_of` and `edges_of` have them for this `window`.
    """
    found: dict[str, Tensor] = {}
    for layer, values in zip(graph.layers, nodes.split([layer.size for layer in graph.layers]), strict=True):
        for norm, first in ((layer.norm, 0), (layer.other, 4)):
            if norm is not None:
                found |= {name: values[:, first + i] for i, name in enumerate((norm.weight, norm.bias)) if name}
        found |= {name: values[:, place] for name, place in ((layer.bias, 1), (layer.other_bias, 5)) if name}
    sizes = [tensors[k.weight].numel() // (k.window[0] * k.window[1]) if k.weight else graph.layers[k.target].size
             for k in graph.kernels]  # fmt: skip
    for kernels, values in zip(graph.kernels, edges.split(sizes), strict=True):
        if kernels.weight:
            left, right, top, bottom = _around(kernels, window)
            kept = values.view(-1, *window)[:, top : window[0] - bottom, left : window[1] - right]
            found[kernels.weight] = kept.reshape(tensors[kernels.weight].shape)
    return found


def _around(kernels: Kernels, window: tuple[int, int]) -> tuple[int, int, int, int]:
    """Zeros left, right, above and below of a kernel, so that its middle is that of the window."""
    (height, width), (high, wide) = kernels.window, window
    left, top = (wide - width) // 2, (high - height) // 2
    return left, wide - width - left, top, high - height - top


def save_metanetwork(file: Path, metanetwork: Metanetwork) -> None:
    """Writes it whole or not at all."""
    weights = {name: tensor.detach().contiguous() for name, tensor in metanetwork.state_dict().items()}
    said = {"shape": asdict(metanetwork.shape), "trained_on": list(metanetwork.trained_on)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        save_file(weights, partial, {"format": FORMAT, "metanetwork": json.dumps(said)})


def load_metanetwork(file: Path) -> Metanetwork:
    """What `save_metanetwork` wrote.

    Raises:
        RecipeError: The file cannot be read, or holds something else.
    """
    advice = "give a file that scripts/metatrain.py wrote"
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            if about.get("format") != FORMAT:
                raise RecipeError(f"{file}: holds no metanetwork; {advice}")
            said = json.loads(about["metanetwork"])
            shape = Shape(**said["shape"])
            sizes = (shape.layers, _LAYERS), (shape.width, _WIDTH), (shape.height * shape.breadth, _WIDTH)
            if not all(0 < size <= most for size, most in sizes):
                raise ValueError(f"{shape} is out of bounds")
            made = Metanetwork(shape, tuple(map(str, said["trained_on"])))
            made.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise RecipeError(f"{file}: is no metanetwork; {str(error).splitlines()[0]}; {advice}") from error
    return made.eval().requires_grad_(False)
