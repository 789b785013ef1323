"""Graphs of channels: they hold every weight, agree with the dependency groups, and say what they cannot hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.core.channels import ChannelGraph
from compressor.core.errors import CheckpointError
from compressor.core.tensors import named_tensors
from compressor.graph.channels import channel_graph
from compressor.graph.groups import find_groups
from compressor.passes.parts.metanetwork import edges_of, nodes_of, written
from tests import pico
from tests.graph import zoo

NETWORKS = {
    "resnet": zoo.ResNet, "resnext": lambda: zoo.ResNet(groups=4), "vgg": zoo.VGG, "mobilenet": zoo.MobileNet,
    "biased": pico.ResNet,
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 6, (2, 5)), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                   nn.Linear(6, 4, bias=False)),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    module = zoo.with_statistics(NETWORKS[name]())
    return module, channel_graph(module, zoo.image())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_back_is_what_was_read(name):
    module, graph = made(name)
    tensors = named_tensors(module)
    window = graph.window[0] + 1, graph.window[1] + 2  # of a larger family
    found = written(graph, tensors, nodes_of(graph, tensors), edges_of(graph, tensors, window), window)
    assert all(torch.equal(values, tensors[name]) for name, values in found.items())
    left = {name for name, _ in module.named_parameters()} - set(found)
    assert left == ({"features.3.bias"} if isinstance(module, zoo.VGG) else set())  # a norm follows that convolution


@pytest.mark.parametrize("name", NETWORKS)
def test_nodes_are_the_units_of_the_dependency_groups(name):
    """All rows of a unit lead to its nodes, and all columns that read it start there: found in two ways."""
    module, graph = made(name)
    of_node: dict[int, tuple[str, int]] = {}
    rows = {kernels.weight: (kernels, start) for kernels, start in zip(graph.kernels, first_edges(graph), strict=True)}
    pairs = graph.pairs()
    for group in find_groups(module, zoo.image()):
        for member in group.members:
            if member.tensor not in rows:
                continue
            kernels, start = rows[member.tensor]
            height, width = kernels.window
            shape = named_tensors(module)[member.tensor].shape
            edges = torch.arange(start, start + shape.numel() // (height * width)).view(shape[0], -1)
            for unit, places in enumerate(member.index):
                if member.dim == 0:
                    nodes = pairs[1, edges[places].flatten()]
                else:
                    flattened = height * width if len(shape) == 2 else 1
                    nodes = pairs[0, edges[:, (places // flattened).unique()].flatten()]
                for node in set(nodes.tolist()):
                    if kernels.groups == 1:
                        assert of_node.setdefault(node, (group.name, unit)) == (group.name, unit)
    assert len(of_node) > sum(layer.size for layer in graph.layers) // 2


def first_edges(graph: ChannelGraph) -> list[int]:
    """The number of the first edge of each kernels, counted anew."""
    found, n = [], 0
    for kernels in graph.kernels:
        found.append(n)
        n_in, n_out = graph.layers[kernels.source].size, graph.layers[kernels.target].size
        n += n_out * n_in // kernels.groups if kernels.weight else n_out
    return found


def test_a_small_kernel_lies_in_the_middle():
    module = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([2.0, 3.0]).view(1, 2, 1, 1))
    graph = channel_graph(module, (torch.zeros(2, 2, 1, 1),))
    edges = edges_of(graph, named_tensors(module), (3, 3))
    assert edges[:, 4].tolist() == [2, 3]
    assert edges.abs().sum() == 5
    assert graph.pairs().tolist() == [[0, 1], [2, 2]]


def test_a_sum_has_both_norms_and_an_edge_for_what_is_passed_on():
    module, graph = made("resnet")
    projected, identical = (layer for layer in graph.layers if layer.size == 32)
    assert projected.norm and projected.norm.weight == "layers.0.expand.1.weight"
    assert projected.other and projected.other.weight == "layers.0.shortcut.1.weight"
    assert identical.norm and identical.other is None
    passed = [kernels for kernels in graph.kernels if not kernels.weight]
    assert [(graph.layers[k.source], graph.layers[k.target]) for k in passed] == [(projected, identical)]
    nodes = nodes_of(graph, named_tensors(module))
    start = graph.starts[graph.layers.index(projected)]
    norm = module.layers[0].shortcut[1]
    wanted = torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var], 1)
    assert torch.equal(nodes[start : start + 32, 4:], wanted)
    assert nodes[0].tolist() == [1, 0, 0, 1, 1, 0, 0, 1]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(x))).mean((2, 3))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 3, 3), nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * self.scale).mean((2, 3))


@pytest.mark.parametrize(("module", "reason"), [
    (zoo.DenseNet, "computes cat"), (zoo.UNet, "computes conv_transpose2d"), (Twice, "'conv.weight' is used twice"),
    (Scaled, "computes mul"), (lambda: zoo.MobileNet(excite=True), "computes mul"),
    (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), "does not follow a convolution right away"),
])  # fmt: skip
def test_what_is_no_graph_of_kernels_is_named(module, reason):
    with pytest.raises(CheckpointError, match=reason):
        channel_graph(module().eval(), zoo.image())


def test_texts_are_no_images():
    with pytest.raises(CheckpointError, match="an input of 2 dimensions"):
        channel_graph(nn.Linear(4, 2), (torch.zeros(2, 4),))
