"""What examples ask of a network: found on one of them, it bounds batches, and the plan's memory and time are of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from compressor.core.errors import ResourceError
from compressor.core.options import RunOptions
from compressor.graph.blocks import unfold_inputs, unfolded_pieces
from compressor.plan.recipe_file import load_recipe
from compressor.plan.sizes import cpu_seconds
from compressor.plan.workload import HELD_AT_ONCE, LayerWork, Workload
from compressor.run.prepare import prepare


def network(tmp_path, width):
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Conv2d(3, 256, 3, 2, 1), nn.ReLU(), nn.Conv2d(256, 4, 1)), tmp_path / "net.pt")
    inputs = np.random.default_rng(0).normal(size=(6, 3, width, width)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=inputs)
    return RunOptions(
        model=str(tmp_path / "net.pt"), recipe="cnn-4bit", data=str(tmp_path / "data.npz"), trust_pickle=True,
        output=tmp_path / "out",
    )  # fmt: skip


def test_every_call_of_a_layer_is_counted_on_an_example(tmp_path):
    load = prepare(network(tmp_path, 16)).samples.calibration.load
    assert load.layers == (
        LayerWork("0", (256, 3, 3, 3), 1, 3 * 256, 256 * 64), LayerWork("2", (4, 256, 1, 1), 1, 256 * 64, 4 * 64)
    )  # fmt: skip
    assert (load.given, load.products) == (768, 64 * 27 * 256 + 64 * 1024)


def test_layers_called_again_and_wide_ones_of_few_outputs_take_the_time_that_they_take():
    recipe = load_recipe("cnn-4bit")
    called = [LayerWork(str(i % 4), (64, 64), 1, 65536, 65536) for i in range(80)]
    apart = [replace(layer, name=str(i)) for i, layer in enumerate(called)]
    again, once = (cpu_seconds((), recipe, Workload(tuple(each), 64, 64, 64)) for each in (called, apart))
    assert again < once
    wide, square = ((LayerWork("0", shape, 1, 4096, 1024 * shape[0]),) for shape in ((4, 4096), (128, 128)))
    assert cpu_seconds((), recipe, Workload(wide, 64, 64, 64)) > 5 * cpu_seconds(
        (), recipe, Workload(square, 64, 64, 64)
    )


def test_time_and_memory_of_a_plan_grow_with_what_an_example_asks_for(tmp_path):
    small, large = (prepare(network(tmp_path, width)).plan for width in (16, 128))
    assert large.cpu_seconds > small.cpu_seconds
    assert large.peak_memory > small.peak_memory + 4 * 6 * 3 * 128**2


def test_more_memory_than_there_may_be_is_refused_once_the_data_are_known(tmp_path):
    options = network(tmp_path, 128)
    least = prepare(options).plan.peak_memory
    with pytest.raises(ResourceError, match="--max-ram"):
        prepare(RunOptions(**vars(options) | {"max_ram": least - 20_000_000}))


def test_few_large_examples_make_a_batch():
    layer = LayerWork("a", (64, 64, 3, 3), 1, HELD_AT_ONCE // 8, HELD_AT_ONCE // 8)
    assert Workload((layer,), 1000, 1000).at_once == 4
    assert Workload((), 1000, 1000).at_once == 32
    assert Workload((), 2**19, 2**19).at_once == 2


@pytest.mark.parametrize("most", [100, 800])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 3, 3, 2, 1), nn.Conv2d(4, 3, (2, 3), 1, "same"), nn.Conv1d(4, 3, 5, padding="same"),
              nn.Conv1d(4, 3, 3, 2, dilation=2)]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_inputs_unfolded_a_few_at_a_time_are_the_same_rows(layer, most):
    inputs = torch.randn(5, 4, *[9] * (layer.weight.dim() - 2), generator=torch.Generator().manual_seed(1))
    pieces = list(unfolded_pieces(layer, inputs, most=most))
    rows = unfold_inputs(layer, inputs)
    assert (len(pieces) > 1) == (rows.numel() > most)
    assert all(piece.numel() <= max(most, 9 * 24) for piece in pieces)  # a line of positions at least
    torch.testing.assert_close(torch.cat(pieces), rows, rtol=0, atol=0)
