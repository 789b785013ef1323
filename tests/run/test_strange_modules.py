"""Other people's modules through the command: the artifact computes in onnxruntime what the original's forward does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from compressor.cli.commands import main
from compressor.core.outputs import named_outputs
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
    "kind",
    [
        strange.Chain, strange.Residual, strange.NormBetween, strange.SideBySide, strange.Scaled, strange.Collecting,
        strange.LastAdded, strange.Backwards, strange.CalledTwice, strange.InsidesCalled, strange.Pairs,
        strange.FirstOfPairs, strange.SecondOfPairs, strange.Dicts, strange.Memories, strange.Previouses,
    ],
)  # fmt: skip
def test_what_the_parent_does_between_its_blocks_is_in_the_artifact(kind: type, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)


@pytest.mark.parametrize(
    "kind", [strange.ListsOfLists, strange.ListsOfDicts, strange.DictOfLists, strange.EmptyList, strange.UNet]
)
def test_lists_of_lists_are_no_blocks(kind: type, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        strange.TwiceInARow, strange.ThriceInARow, strange.TwiceApart, strange.TwiceTheLast, strange.TwiceWithItself,
        strange.TiedAutoencoder, strange.TiedInARow, strange.BiasMade, strange.TableAndHead, strange.ConvolvedTwice,
    ],
)  # fmt: skip
def test_a_layer_may_be_used_twice_in_a_row(kind: type, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)
