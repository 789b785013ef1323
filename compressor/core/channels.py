"""A network of convolutions as a graph of its channels: a layer of nodes, kernels between two layers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelNorm:
    """The tensors of a batch norm by name; empty where it has none of that kind."""

    weight: str
    bias: str
    mean: str
    variance: str


@dataclass(frozen=True)
class ChannelLayer:
    """Channels that are computed together: of a convolution or linear, or of a sum.

    size    how many
    norm    that they go through; of a sum, that of its main way
    other   of a sum, the norm of its shortcut
    bias    name of what is added where there is no norm; empty where nothing is, and where a norm takes it away again
    other_bias   the same of a shortcut
    """

    size: int
    norm: ChannelNorm | None = None
    other: ChannelNorm | None = None
    bias: str = ""
    other_bias: str = ""


@dataclass(frozen=True)
class Kernels:
    """The kernels from the channels of one layer to those of a later one.

    weight           name of the tensor (out, in / groups, …); empty where channels are passed on as they are
    source, target   numbers of the layers
    window           (height, width) of a kernel; (1, 1) of a linear
    groups           of the channels, each of which sees its own
    """

    weight: str
    source: int
    target: int
    window: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class ChannelGraph:
    """All layers, the network's input first and its output last, and all kernels, both in the order of a forward."""

    layers: tuple[ChannelLayer, ...]
    kernels: tuple[Kernels, ...]

    @property
    def starts(self) -> list[int]:
        """The number of each layer's first node, and how many there are in all."""
        return [0, *accumulate(layer.size for layer in self.layers)]

    @property
    def window(self) -> tuple[int, int]:
        """The largest height and the largest width of a kernel."""
        windows = [kernels.window for kernels in self.kernels]
        return max(height for height, _ in windows), max(width for _, width in windows)

    @property
    def adds(self) -> bool:
        """Whether there are sums, as of residual networks."""
        return len({kernels.target for kernels in self.kernels}) < len(self.kernels)

    def pairs(self) -> Tensor:
        """LongTensor (2, edges): source and target node of every kernel, row-major in its tensor."""
        starts, found = self.starts, []
        for kernels in self.kernels:
            n_in, n_out = self.layers[kernels.source].size, self.layers[kernels.target].size
            targets = torch.arange(n_out)
            if not kernels.weight:
                sources = targets.unsqueeze(1)
            else:
                first = targets // (n_out // kernels.groups) * (n_in // kernels.groups)
                sources = first.unsqueeze(1) + torch.arange(n_in // kernels.groups)
            targets = targets.unsqueeze(1).expand_as(sources)
            found.append(torch.stack([starts[kernels.source] + sources, starts[kernels.target] + targets]).flatten(1))
        return torch.cat(found, 1)

    def fingerprint(self) -> str:
        """Tells architectures apart, whatever their widths: what leads where."""
        ways = [(kernels.source, kernels.target, *kernels.window, kernels.groups > 1) for kernels in self.kernels]
        return hashlib.sha256(json.dumps(ways).encode()).hexdigest()
