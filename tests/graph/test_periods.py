"""Rows of blocks that repeat are found by what the blocks are made of."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from compressor.graph.periods import Period, as_few_as_tell, first_blocks, period_of


class Block(nn.Module):
    def __init__(self, layer_idx: int, window: int | None = None, width: int = 4) -> None:
        super().__init__()
        self.layer_idx, self.window, self.linear = layer_idx, window, nn.Linear(width, width)


class Row(nn.Module):
    def __init__(self, *windows: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, window) for i, window in enumerate(windows))


NAMES = tuple(f"blocks.{i}" for i in range(9))


@pytest.mark.parametrize(
    ("windows", "start", "length"),
    [([None] * 9, 1, 1), ([8, None] * 4 + [8], 1, 2), ([8] + [None] * 8, 1, 1), ([None] * 4 + [8] * 5, 4, 1)],
)
def test_the_shortest_period_is_found(windows, start, length):
    assert period_of(Row(*windows)) == Period(NAMES, start, length)


def test_what_is_not_seen_three_times_is_no_period():
    assert period_of(Row(None, None, None)) is None
    assert period_of(Row(1, 2, 3, 4, 5, 6, 7)) is None
    assert period_of(nn.Linear(3, 3)) is None


def test_the_first_blocks_share_their_weights_with_all_of_them():
    row = Row(*[None] * 6)
    short = first_blocks(row, [f"blocks.{i}" for i in range(6)], 2)
    assert len(row.blocks) == 6
    assert [name for name, _ in short.named_parameters()] == [
        "blocks.0.linear.weight", "blocks.0.linear.bias", "blocks.1.linear.weight", "blocks.1.linear.bias",
    ]  # fmt: skip
    assert short.get_parameter("blocks.1.linear.weight") is row.get_parameter("blocks.1.linear.weight")


def test_as_many_blocks_tell_as_hold_every_kind():
    short = as_few_as_tell(Row(None, None, None, 8, None, 8))
    assert short is not None
    assert len(short.get_submodule("blocks")) == 4
    assert as_few_as_tell(Row(None, 8)) is None


def test_a_transformer_of_equal_layers_has_a_period_of_one():
    config = transformers.GPT2Config(n_layer=5, n_embd=8, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        found = period_of(transformers.GPT2LMHeadModel(config))
    assert found is not None
    assert (found.start, found.length, found.names[4]) == (1, 1, "transformer.h.4")
