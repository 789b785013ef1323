"""Other people's modules through the command: the artifact computes in onnxruntime what the original's forward does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from compressor.checkpoints import open_checkpoint
from compressor.cli.commands import main
from compressor.core.outputs import named_outputs
from compressor.sweeps.network import Network
from tests import pico
from tests.run import strange

RECIPE = """
passes: [{pass: affine, method: gptq, bits: 8, group: 16}]
calibration: {samples: 24}
embeddings: {bits: 8, group: 16}
export: {activations: exact}
evaluation: {samples: 8, speed: false}
"""
SAME = 0.03
"""Of eight bits, as a share of the largest value."""


def made(kind: Any, folder: Path) -> tuple[nn.Module, list[str]]:
    """The network with weights of its own, and arguments of the command that name it."""
    network = kind()
    pico.lively(network, 3)
    torch.save(network.state_dict(), folder / "net.pt")
    np.savez(folder / "x.npz", **kind.inputs())
    (folder / "recipe.yaml").write_text(RECIPE)
    return network.eval(), [
        str(folder / "net.pt"), "--arch", f"tests.run.strange:{kind.__name__}", "--data", str(folder / "x.npz"),
        "-o", str(folder / "out"),
    ]  # fmt: skip


def answers(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the artifact gives for inputs by name; a single one may be called otherwise there."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feeds = dict(zip(names, inputs.values(), strict=True)) if len(names) == 1 else inputs
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, feeds), strict=True))


def assert_same(network: nn.Module, folder: Path, inputs: dict[str, np.ndarray], within: float = SAME) -> None:
    some = {name: array[:9].copy() for name, array in inputs.items()}
    with torch.no_grad():
        wanted = named_outputs(network(*(torch.tensor(array) for array in some.values())))
    found = answers(folder, some)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        worst = np.abs(found[name] - tensor.numpy()).max() / np.abs(tensor.numpy()).max()
        assert worst < within, f"{name} is off by {worst:.3f}"


def status(arguments: list[str]) -> object:
    """The command's exit status."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code or 0


def assert_right(kind: Any, folder: Path, *more: str, within: float = SAME) -> None:
    """The command delivers it, and the artifact computes what the network does."""
    network, named = made(kind, folder)
    more = more or ("--recipe", str(folder / "recipe.yaml"))
    assert status([*named, *more]) == 0
    assert_same(network, folder / "out", kind.inputs(), within)


@pytest.mark.parametrize(
    ("kind", "streams"),
    [
        (strange.Chain, True), (strange.FirstOfPairs, True), (strange.Residual, False), (strange.NormBetween, False),
        (strange.SideBySide, False), (strange.Scaled, False), (strange.Collecting, False), (strange.LastAdded, False),
        (strange.Backwards, False), (strange.Skipping, False), (strange.CalledTwice, False), (strange.Pairs, False),
        (strange.InsidesCalled, False), (strange.SecondOfPairs, False), (strange.Dicts, False),
        (strange.Memories, False), (strange.Previouses, False), (strange.ListsOfLists, False),
        (strange.ListsOfDicts, False),
    ],
)  # fmt: skip
def test_blocks_are_streamed_only_where_each_is_called_on_what_the_one_before_gave_and_nothing_else_is(
    kind: type, streams: bool, tmp_path: Path
) -> None:
    network, named = made(kind, tmp_path)
    checkpoint = open_checkpoint(named[0], arch=named[2])
    streamed = Network(checkpoint, fast=False)
    batches = [{"x": torch.tensor(kind.inputs()["x"][i : i + 8])} for i in (0, 8)]
    seen = []
    for name, block, reached in streamed.sweep(batches):
        seen.append(name)
        last = [streamed.step(block, arguments) for arguments in reached] if name else []
    assert seen == ([f"blocks.{i}" for i in range(4)] if streams else [""])
    if streams:
        with streamed.tail() as run, torch.no_grad():
            for batch, state in zip(batches, last, strict=True):
                assert torch.allclose(run(batch, state), network(batch["x"]), atol=1e-5)


@pytest.mark.parametrize("kind", [strange.Residual, strange.Collecting, strange.Pairs, strange.Memories])
def test_what_the_parent_does_between_its_blocks_is_in_the_artifact(kind: type, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)


@pytest.mark.parametrize("kind", [strange.Lists, strange.UNet])
def test_lists_of_lists_are_no_blocks(kind: type, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)


@pytest.mark.parametrize("kind", [strange.UsedAgain, strange.TableAndHead, strange.ConvolvedTwice])
def test_a_layer_may_be_used_twice_in_a_row(kind: type, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)
