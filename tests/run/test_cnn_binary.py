"""Networks of one bit per weight, from a checkpoint to an artifact: the recipes cnn-binary and llm-1bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError, UsageError
from compressor.core.options import RunOptions
from compressor.evaluate.session import open_session
from compressor.export import int8_regions
from compressor.learning import trainer as fitting
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.run.pipeline import run
from compressor.runtime.sessions import optimised_graph
from tests import pico
from tests.core.interrupting import Interrupting

SETS = ("reste.epochs=6", "reste.batch=16", "reste.rate=0.05", "calibration.samples=24",
        "evaluation.speed=false")  # fmt: skip
CONVOLUTIONS = ["blocks.0.conv1.weight", "blocks.0.conv2.weight", "blocks.1.conv1.weight", "blocks.1.conv2.weight"]


class Mixed(nn.Module):
    """A convolution, then linears of which one is between others, and torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.inner, self.head = nn.Linear(64, 36), nn.Linear(36, 2)

    def forward(self, x):
        x = torch.relu(self.wide(torch.relu(self.stem(x)).flatten(2).transpose(1, 2)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.inner(x)).mean(1))


@pytest.fixture(scope="module", autouse=True)
def folder(module_here):
    """Images with labels, networks."""
    generator = np.random.default_rng(0)
    for name, n in (("training", 96), ("evaluation", 1000)):
        images = generator.standard_normal((n, 3, 12, 12)).astype(np.float32)
        np.savez(module_here / f"{name}.npz", image=images, labels=images[:, :, :6].mean((1, 2, 3)) > 0)
    pico.write_state_dict(pico.ResNet, module_here / "model.pt")
    pico.write_state_dict(Mixed, module_here / "mixed.pt")
    plain = "  - {pass: reste, epochs: 6, batch: 16, rate: 0.05%s}\ncalibration: {samples: 24}\n"
    plain += "evaluation: {speed: false}\n"
    for name, settings in (("float", ""), ("signs", ", activations: binary, scale: channel"),
                           ("some", ", activations: binary, skip: ['attention*']")):  # fmt: skip
        (module_here / f"{name}.yaml").write_text(f"passes:\n{plain % settings}")
    return module_here


def options(**changes) -> RunOptions:
    known = {"model": "model.pt", "recipe": "cnn-binary", "arch": "tests.pico:ResNet", "data": "training.npz",
             "eval": "evaluation.npz", "sets": SETS, "force": True}  # fmt: skip
    return RunOptions(**(known | changes))


@pytest.fixture(scope="module")
def whole(folder):
    """As in networks that are large enough for int8 to be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_regions, "convolution_times", lambda *_: (1e9, 1.0))
        return run(options(output=Path("whole")))


def torch_accuracy(directory: str, arch: str = "tests.pico:ResNet") -> float:
    module, data = compressor.load(directory, arch=arch), np.load("evaluation.npz")
    with torch.no_grad():
        return float((module(torch.from_numpy(data["image"])).argmax(1).numpy() == data["labels"]).mean())


def artifact_accuracy(directory: str) -> float:
    session, data = open_session(Path(directory)), np.load("evaluation.npz")
    found = session.run({next(iter(session.inputs)): data["image"]})[session.outputs[0]]
    return float((found.argmax(1) == data["labels"]).mean())


def test_the_recipe_makes_inner_convolutions_binary_and_runs_them_on_int8(whole, tmp_path):
    report = whole.report
    (step,) = report["structure"]
    assert step["binary"] == CONVOLUTIONS
    assert step["dense"] == {
        "stem.weight": "reads the network's input",
        "blocks.0.shortcut.weight": "is the only layer of a shortcut",
        "head.weight": "gives the network's output",
    }
    assert step["training"][-1]["loss"] < step["training"][0]["loss"]
    assert step["training"][-1]["o"] == 3.0
    binary = report["binary"]
    assert binary["runs_as"] == {"an int8 convolution": 4}
    assert binary["float_bytes"] >= 20 * binary["bytes"]
    assert report["proof"]["exact"]["max_relative_error"] < 1e-5
    assert report["quality"]["accuracy"] > report["quality"]["original_accuracy"] + 0.1
    run_as = [node.op_type for node in ir.load(optimised_graph(whole.directory / "model.onnx", tmp_path)).graph]
    assert run_as.count("QLinearConv") >= 4
    assert "Gather" not in run_as, "bits are unpacked when the artifact loads"


@pytest.mark.parametrize(("name", "kind"), [("float", "a float32 convolution"), ("signs", "a float32 convolution")])
def test_without_int8_the_artifact_is_as_accurate_as_torch(folder, name, kind):
    artifact = run(options(recipe=f"{name}.yaml", sets=(), output=Path(name)))
    report = artifact.report
    assert report["binary"]["runs_as"] == {kind: 4}
    assert report["structure"][0]["binary"] == CONVOLUTIONS
    assert report["structure"][0]["training"][-1]["loss"] < report["structure"][0]["training"][0]["loss"]
    assert abs(artifact_accuracy(name) - torch_accuracy(name)) <= 0.001
    assert (folder / name / "structure.json").is_file() == (name == "signs")
    module = compressor.load(name, arch="tests.pico:ResNet")
    for weight in CONVOLUTIONS:
        rows = module.get_parameter(weight).flatten(1).abs()
        assert bool((rows == rows[:, :1]).all())


def test_linears_run_as_low_bit_products_and_attention_is_binary_as_well(folder):
    found = run(options(model="mixed.pt", arch=f"{__name__}:Mixed", recipe="float.yaml", sets=(), output=Path("m")))
    assert found.report["structure"][0]["binary"] == ["wide.weight", "attention.out_proj.weight", "inner.weight"]
    assert found.report["binary"]["runs_as"] == {"a 2-bit matrix product": 3}
    assert found.report["proof"]["exact"]["max_relative_error"] < 1e-5


def test_what_cannot_have_binary_inputs_is_refused_by_name_and_the_rest_can(folder):
    mixed = {"model": "mixed.pt", "arch": f"{__name__}:Mixed", "sets": ()}
    (folder / "all.yaml").write_text((folder / "some.yaml").read_text().replace(", skip: ['attention*']", ""))
    with pytest.raises(CheckpointError, match=r"'attention.out_proj.weight': activations: binary puts signs before"):
        run(options(recipe="all.yaml", output=Path("refused"), **mixed))
    found = run(options(recipe="some.yaml", output=Path("some"), **mixed))
    assert found.report["structure"][0]["binary"] == ["wide.weight", "inner.weight"]
    assert found.report["proof"]["exact"]["max_relative_error"] < 1e-5
    assert (
        abs(artifact_accuracy("some") - torch_accuracy("some", mixed["arch"])) <= 0.02
    )  # of 8-bit activations in the products


def test_an_interrupted_run_goes_on_to_the_same_bytes(monkeypatch, whole):
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_SAVES", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(options(output=Path("again"), progress=Interrupting("reste", 0.6)))
    state = torch.load("again.partial/work/structure-0-training/training.pt", weights_only=True)
    assert 1 < state["follower"]["o"] < 3
    again = run(options(output=Path("again"), resume=True))
    first, second = ((each.directory / "model.safetensors").read_bytes() for each in (whole, again))
    assert first == second


def test_a_plan_guesses_the_dense_layers_from_names_and_says_so(folder):
    plan = make_plan(open_checkpoint("model.pt", arch="tests.pico:ResNet"), load_recipe("cnn-binary"))
    assert [tensor.name for tensor in plan.tensors if tensor.by == "reste"] == CONVOLUTIONS
    assert any("leaves alone what reads the input" in note for note in plan.notes)


def test_an_encoder_has_binary_inputs_and_is_not_asked_for_gradients_through_them(folder, bert):
    (folder / "signs-of-text.yaml").write_text(
        "passes: [{pass: reste, activations: binary, epochs: 1, batch: 8, rate: 0.01}]\n"
        "calibration: {tokens: 1024, window: 64}\nevaluation: {tokens: 0, speed: false}\n"
    )
    found = run(RunOptions(model=str(bert), recipe="signs-of-text.yaml", output=Path("encoder")))
    assert found.report["binary"]["runs_as"] == {"a 2-bit matrix product": 13}
    assert found.report["proof"]["exact"]["max_relative_error"] < 1e-4
    with pytest.raises(UsageError, match="widths are allocated by gradients, and binary inputs have none"):
        run(RunOptions(model=str(bert), recipe="signs-of-text.yaml", output=Path("none"), target_size=10**5))


def test_a_language_model_of_one_bit_per_weight(llama):
    sets = ("calibration.tokens=2048", "calibration.window=64", "evaluation.tokens=512", "evaluation.window=64",
            "reste.batch=8", "reste.epochs=2")  # fmt: skip
    found = run(RunOptions(model=str(llama), recipe="llm-1bit", sets=sets, output=Path("one")))
    report = found.report
    assert report["structure"][0]["dense"] == {}
    assert len(report["structure"][0]["binary"]) == 21
    assert report["structure"][0]["training"][1]["loss"] < report["structure"][0]["training"][0]["loss"]
    assert report["binary"]["runs_as"] == {"a 2-bit matrix product": 21}
    assert report["binary"]["float_bytes"] > 20 * report["binary"]["bytes"]
    assert report["proof"]["exact"]["max_relative_error"] < 1e-4
    with pytest.raises(CheckpointError, match="the graph of decoders has no layers on binary inputs"):
        run(RunOptions(model=str(llama), recipe="llm-1bit", sets=("reste.activations=binary",), output=Path("no")))
