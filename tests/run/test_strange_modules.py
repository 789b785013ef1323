"""Other people's modules through the command: the artifact computes in onnxruntime what the original's forward does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.cli.commands import main
from compressor.core.outputs import named_outputs
from compressor.core.tensors import EncodedTensors
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
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


NORMALISED = [
    strange.WeightNorm, strange.OldWeightNorm, strange.SpectralNorm, strange.OldSpectralNorm, strange.Orthogonal,
    strange.OwnParametrisation,
]  # fmt: skip


@pytest.mark.parametrize("kind", NORMALISED)
def test_weights_that_are_computed_from_others_are_read_as_they_are_computed(kind: Any, tmp_path: Path) -> None:
    network, named = made(kind, tmp_path)
    checkpoint = open_checkpoint(named[0], arch=named[2])
    checkpoint.check()
    names = {name for name in checkpoint.tensors if name.endswith("weight")}
    layers = {f"{name}.weight": layer for name, layer in network.named_modules() if hasattr(layer, "bias")}
    with torch.no_grad():
        network(torch.tensor(kind.inputs()["x"]))  # which is when a hook computes
    assert names == layers.keys() and not checkpoint.skipped
    for name, layer in layers.items():
        assert torch.allclose(checkpoint.read(name), layer.weight.data, atol=1e-6)
        assert checkpoint.tensors[name].shape == tuple(layer.weight.shape)


@pytest.mark.parametrize("kind", [strange.WeightNorm, strange.OldSpectralNorm, strange.OwnParametrisation])
def test_weights_that_are_computed_from_others_are_encoded(kind: Any, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)
    encoded = EncodedTensors([tmp_path / "out" / "model.safetensors"])
    assert sum(encoded.describe(name)["kind"] == "affine" for name in encoded) >= 1
    assert not any("parametrizations" in name or name.endswith(("_v", "_orig")) for name in encoded)


@pytest.mark.parametrize("file", ["old", "new"])
def test_a_file_of_lengths_and_directions_fits_a_module_without_them(file: str, tmp_path: Path) -> None:
    kind = strange.WeightNorm if file == "new" else strange.OldWeightNorm
    network, named = made(kind, tmp_path)
    with torch.no_grad():
        network(torch.tensor(kind.inputs()["x"]))  # which is when a hook computes
    plain = open_checkpoint(named[0], arch="tests.run.strange:Normalised")
    plain.check()
    assert torch.allclose(plain.read("layers.5.weight"), network.layers[5].weight.data, atol=1e-6)
    other = "OldWeightNorm" if file == "new" else "WeightNorm"
    crossed = open_checkpoint(named[0], arch=f"tests.run.strange:{other}")
    crossed.check()
    assert torch.allclose(crossed.read("layers.0.weight"), network.layers[0].weight.data, atol=1e-6)


def test_a_plain_file_fits_a_module_that_computes_its_weights(tmp_path: Path) -> None:
    network, named = made(strange.Normalised, tmp_path)
    checkpoint = open_checkpoint(named[0], arch="tests.run.strange:SpectralNorm")
    checkpoint.check()
    assert torch.equal(checkpoint.read("layers.2.weight"), network.layers[2].weight.data)


@pytest.mark.parametrize("kind", [strange.WeightNorm, strange.OldWeightNorm])
def test_a_network_in_memory_may_have_parametrisations(kind: Any, tmp_path: Path) -> None:
    network, _ = made(kind, tmp_path)
    before = dict(network.state_dict())
    compressor.compress(network, str(tmp_path / "recipe.yaml"), tmp_path / "out", data=str(tmp_path / "x.npz"))
    assert_same(network, tmp_path / "out", kind.inputs())
    assert before.keys() == network.state_dict().keys()


def test_an_lstm_that_projects_is_refused_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, named = made(strange.ProjectedLstm, tmp_path)
    recipe = ["--recipe", str(tmp_path / "recipe.yaml")]
    assert status([*named, *recipe, "--dry-run"]) == status([*named, *recipe]) == 3
    assert "proj_size" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [strange.RecurrentAll, strange.DeepLstm, strange.Given])
def test_recurrent_networks_are_stored_as_the_plan_says(kind: Any, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)
    checkpoint = open_checkpoint(tmp_path / "net.pt", arch=f"tests.run.strange:{kind.__name__}")
    checkpoint.check()
    plan = make_plan(checkpoint, load_recipe(str(tmp_path / "recipe.yaml")))
    written = EncodedTensors([tmp_path / "out" / "model.safetensors"])
    matrices = [tensor for tensor in plan.tensors if ".weight_" in tensor.name]
    assert len(matrices) >= 2 and all(tensor.by == "affine" for tensor in matrices if tensor.bytes_before > 16384)
    assert {tensor.name: tensor.spec.kind for tensor in plan.tensors} == {
        name: written.describe(name)["kind"] for name in written
    }
    assert {tensor.name: tensor.bytes_after for tensor in plan.tensors} == {
        name: written.nbytes(name) for name in written
    }


@pytest.mark.parametrize("kind", [strange.OddConfigs, strange.InPlaceBlocks, strange.StrideOfList, strange.OneChannel])
def test_odd_networks_are_compressed_all_the_same(kind: Any, tmp_path: Path) -> None:
    assert_right(kind, tmp_path)


@pytest.mark.parametrize(
    ("kind", "recipe", "reason"),
    [
        (strange.AlwaysDropped, "encoder-4bit", "another output each time"),
        (strange.Noisy, "encoder-4bit", "draws random numbers"),
        (strange.ComplexBuffer, "encoder-4bit", "complex numbers"),
        (strange.Transposed, "cnn-int8", "is transposed"),
        (strange.FewChannels, "cnn-int8", "of 4 input channels"),
    ],
)
def test_what_cannot_be_right_is_refused_before_work(
    kind: Any, recipe: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, named = made(kind, tmp_path)
    planned = status([*named, "--recipe", recipe, "--dry-run"])
    assert reason in capsys.readouterr().err
    assert planned in (2, 3) and status([*named, "--recipe", recipe]) == planned
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_statistics_beyond_float16_are_stored_as_float32(tmp_path: Path) -> None:
    quick = ("--set", "affine.method=rtn", "--set", "evaluation.speed=false", "--set", "gates.max_loss=1.0")
    assert_right(strange.LargeStatistics, tmp_path, "--recipe", "cnn-int8", *quick, within=0.4)
    written = EncodedTensors([tmp_path / "out" / "model.safetensors"])
    assert written.nbytes("norm.running_var") == 4 * 32


def test_outputs_that_convolutions_give_keep_their_names_on_int8(tmp_path: Path) -> None:
    assert_right(strange.TwoEnds, tmp_path, "--recipe", "cnn-int8", "--set", "evaluation.speed=false", within=0.4)


def test_what_a_norm_of_each_batch_does_is_in_the_artifact_or_refused(tmp_path: Path) -> None:
    network, named = made(strange.PictureNormWithoutStatistics, tmp_path)
    ended = status([*named, "--recipe", str(tmp_path / "recipe.yaml")])
    if not ended:
        assert_same(network, tmp_path / "out", strange.Pictures.inputs())
    assert ended in (0, 3)


def test_blocks_that_look_alike_and_are_not_are_each_traced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="compressor"):
        assert_right(strange.AlikeButOne, tmp_path)
    assert "its blocks looked alike and are not" in caplog.text
