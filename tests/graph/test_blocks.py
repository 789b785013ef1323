"""Blocks are found, layers are matrices, and unfolded inputs times that matrix are what the layer computes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from compressor.graph.blocks import (
    block_names,
    detached,
    first_tensor,
    layers,
    layout_of,
    stages,
    unfold_inputs,
    unfolds,
)
from tests.pico import ResNet, Tied

LAYERS = {
    "linear": (nn.Linear(7, 5), (2, 3, 7)),
    "conv2d": (nn.Conv2d(3, 5, 3), (2, 3, 9, 8)),
    "conv2d, strided and padded": (nn.Conv2d(3, 5, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 3, 9, 8)),
    "conv2d, dilated": (nn.Conv2d(3, 5, 3, dilation=2, padding=1), (2, 3, 9, 8)),
    "conv2d, same": (nn.Conv2d(3, 5, (4, 2), padding="same"), (2, 3, 9, 8)),
    "conv2d, valid": (nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 9, 8)),
    "conv1d": (nn.Conv1d(3, 5, 4), (2, 3, 11)),
    "conv1d, strided and padded": (nn.Conv1d(3, 5, 3, stride=2, padding=2, dilation=2), (2, 3, 11)),
    "conv1d, same": (nn.Conv1d(3, 5, 4, padding="same"), (2, 3, 11)),
    "Conv1D of GPT-2": (transformers.pytorch_utils.Conv1D(5, 7), (2, 3, 7)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_unfolded_inputs_times_the_matrix_are_the_outputs(name):
    layer, shape = LAYERS[name]
    nn.init.normal_(layer.weight)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outputs = layer(x)
    if outputs.dim() > 2 and "onv" in name and "GPT" not in name:
        outputs = outputs.movedim(1, -1)
    matrix = layout_of(layer).matrix(layer.weight)
    found = unfold_inputs(layer, x) @ matrix.T + layer.bias
    torch.testing.assert_close(found, outputs.flatten(0, -2), rtol=1e-4, atol=1e-5)
    assert torch.equal(layout_of(layer).tensor(matrix), layer.weight)


def test_what_is_no_matrix_is_left_alone():
    unknown = (nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.ReLU(), nn.BatchNorm2d(3))
    assert [layout_of(module) for module in unknown] == [None] * 4


def test_a_shared_layer_is_found_once_by_its_first_name():
    assert list(layers(Tied(), "net.")) == ["net.first.weight", "net.second.weight", "net.head.weight"]


def test_grouped_transposed_and_deep_convolutions_are_matrices_that_do_not_unfold():
    network = ResNet()
    assert [unfolds(module) for module in (network.stem, network.depthwise, network.head)] == [True, False, True]
    for module in (network.depthwise, nn.ConvTranspose2d(2, 3, 3), nn.Conv3d(2, 3, 3), nn.Embedding(3, 4)):
        layout = layout_of(module)
        assert layout is not None and not unfolds(module)
        assert torch.equal(layout.tensor(layout.matrix(module.weight)), module.weight)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.large = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))
        self.mixed = nn.ModuleList([nn.Linear(30, 30), nn.Conv2d(1, 1, 1)])
        self.single = nn.ModuleList([nn.Linear(40, 40)])


def test_blocks_are_the_largest_list_of_children_that_are_alike():
    assert block_names(Lists()) == ["large.0", "large.1"]
    assert block_names(ResNet()) == [""]


def test_layers_with_one_input_are_a_stage():
    order = [("q", 1), ("k", 1), ("v", 1), ("o", 2), ("gate", 3), ("up", 3), ("down", 4)]
    found = [(stage.names, stage.calls) for stage in stages(order)]
    assert found == [(["q", "k", "v"], 1), (["o"], 1), (["gate", "up"], 1), (["down"], 1)]


def test_a_layer_that_is_called_again_stays_in_its_first_stage():
    order = [("a", 1), ("b", 1), ("a", 2), ("c", 3), ("a", 4)]
    found = [(stage.names, stage.calls) for stage in stages(order)]
    assert found == [(["a"], 3), (["b"], 1), (["c"], 1)]


def test_the_hidden_state_is_the_first_tensor():
    x = torch.ones(2, requires_grad=True)
    assert first_tensor(x) is x
    assert first_tensor((None, x)) is x
    assert first_tensor({"a": None, "b": x}) is x
    with pytest.raises(TypeError, match="returned tuple without a tensor"):
        first_tensor((None,))
    cut = detached(({"a": [x]}, 3))
    assert cut[1] == 3
    assert not cut[0]["a"][0].requires_grad
