"""Where layers stand, read off traced graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressor.checkpoints import open_checkpoint
from compressor.graph.places import FIRST, LAST, SHORTCUT, UNUSED, layer_places
from tests import pico


def test_of_a_residual_network():
    places = layer_places(pico.ResNet().eval(), {"": torch.zeros(2, 3, 12, 12)})
    special = {name: place for name, place in places.items() if place}
    assert special == {"stem.weight": FIRST, "blocks.0.shortcut.weight": SHORTCUT, "head.weight": LAST}
    assert list(places)[:3] == ["stem.weight", "blocks.0.conv1.weight", "blocks.0.conv2.weight"]


class Bottleneck(nn.Module):
    """The main way begins with a 1×1 convolution as well, and reads the same input as the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 1)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.norm, self.stem, self.unused = nn.BatchNorm2d(8), nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return self.head((y + self.norm(self.down(x))).mean((2, 3)))


def test_of_a_bottleneck_whose_shortcut_reads_what_its_first_layer_reads():
    places = layer_places(Bottleneck().eval(), {"": torch.zeros(2, 3, 5, 5)})
    assert places == {"stem.weight": FIRST, "a.weight": "", "b.weight": "", "c.weight": "",
                      "down.weight": SHORTCUT, "head.weight": LAST, "unused.weight": UNUSED}  # fmt: skip


class Attention(nn.Module):
    """torch's own attention, whose output projection is a weight that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.inner(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def test_a_projection_inside_of_torchs_attention_is_a_layer():
    places = layer_places(Attention().eval(), {"": torch.zeros(2, 5, 8)})
    assert places == {"inner.weight": FIRST, "attention.out_proj.weight": "", "head.weight": LAST}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_language_models_only_tables_are_at_the_ends(checkpoints, kind):
    checkpoint = open_checkpoint(checkpoints(kind))
    places = layer_places(checkpoint.build("cpu").float(), {"input_ids": torch.ones(2, 7, dtype=torch.long)})
    ends = {name for name, place in places.items() if place}
    assert ends
    assert all("embed" in name or "wte" in name or "wpe" in name or "head" in name for name in ends), ends
    assert sum(place == "" for place in places.values()) >= 8
