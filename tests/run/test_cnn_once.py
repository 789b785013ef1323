"""The recipe cnn-once from a checkpoint to an artifact, followed by int8, resumed, and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import compressor
from compressor.core.errors import DataError
from compressor.core.options import RunOptions
from compressor.learning import trainer as fitting
from compressor.run.pipeline import run
from tests import pico
from tests.core.interrupting import Interrupting

ROOT = Path(__file__).parents[2]
SETS = ("hesso.epochs=4", "hesso.batch=16", "hesso.periods=3", "hesso.fraction=0.5", "hesso.rate=0.01",
        "calibration.samples=24", "evaluation.speed=false")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def folder(module_here):
    """Images with labels, a network."""
    generator = np.random.default_rng(0)
    for name, n in (("training", 80), ("evaluation", 40)):
        images = generator.standard_normal((n, 3, 12, 12)).astype(np.float32)
        np.savez(module_here / f"{name}.npz", image=images, labels=images[:, :, :6].mean((1, 2, 3)) > 0)
        np.savez(module_here / f"{name}-unlabelled.npz", image=images)
    pico.write_state_dict(pico.ResNet, module_here / "model.pt")
    return module_here


@pytest.fixture(scope="module")
def artifact(folder):
    return run(options(output=Path("whole")))


def options(**changes) -> RunOptions:
    known = {"recipe": "cnn-once", "data": "training.npz", "eval": "evaluation.npz", "sets": SETS}
    return RunOptions(**({"model": "model.pt", "output": Path("out"), "arch": "tests.pico:ResNet"} | known | changes))


def n_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_an_artifact_has_half_of_the_parameters_and_computes_what_its_weights_say(artifact):
    report = artifact.report
    (step,) = report["structure"]
    original = n_parameters(pico.ResNet())
    assert step["pass"] == "hesso"
    assert step["parameters_before"] == original
    assert 0.4 * original < step["parameters"] <= 0.5 * original
    assert [entry["epoch"] for entry in step["training"]] == [1, 2, 3, 4]
    assert step["training"][-1]["loss"] < step["training"][0]["loss"]
    assert report["proof"]["exact"]["max_relative_error"] < 1e-5
    assert report["quality"]["accuracy"] > report["quality"]["original_accuracy"]
    smaller = compressor.load("whole", arch="tests.pico:ResNet")
    assert n_parameters(smaller) == step["parameters"]
    assert artifact.report["size"]["bytes"] < 0.75 * report["size"]["original_bytes"]


def test_without_labels_the_original_teaches():
    sets = (*SETS, "hesso.fraction=0.2")
    report = run(
        options(data="training-unlabelled.npz", eval="evaluation-unlabelled.npz", sets=sets, force=True)
    ).report
    (step,) = report["structure"]
    assert all(0 < entry["loss"] < 1 for entry in step["training"])
    assert report["quality"]["top1_agreement"] > 0.5


def test_labels_that_a_recipe_asks_for_are_missed_before_anything_is_trained():
    sets = (*SETS, "hesso.loss=labels")
    with pytest.raises(DataError, match="loss labels needs labels, and the data has none"):
        run(options(data="training-unlabelled.npz", eval="evaluation-unlabelled.npz", sets=sets, force=True))


def test_labels_that_are_no_classes_are_refused(folder):
    with np.load("training.npz") as file:
        np.savez("heights.npz", image=file["image"], labels=file["labels"] * 1.5)
    with pytest.raises(DataError, match="labels are float64, and only classes are learned"):
        run(options(data="heights.npz", force=True))


def test_eight_bits_follow_in_one_recipe(folder, artifact):
    (folder / "both.yaml").write_text(
        """
passes:
  - {pass: hesso, fraction: 0.5, epochs: 4, batch: 16, periods: 3, rate: 0.01}
  - {pass: affine, method: rtn, bits: 8, group: row}
calibration: {samples: 24, correct_means: true}
export: {activations: static_int8, dense: float16}
"""
    )
    both = run(options(recipe="both.yaml", sets=(), force=True))
    report = both.report
    assert report["structure"][0]["parameters"] <= 0.5 * n_parameters(pico.ResNet())
    assert report["proof"]["exact"]["max_relative_error"] < 1e-4
    assert report["quality"]["accuracy"] > report["quality"]["original_accuracy"]
    small, large = ((each.directory / "model.safetensors").stat().st_size for each in (both, artifact))
    assert small < 0.5 * large


def test_erased_branches_are_not_in_the_graph(folder, artifact):
    """One of the two blocks' branches, or its projection, is gone from the file, and eight bits follow."""
    (folder / "erased.yaml").write_text(
        """
passes:
  - {pass: oto, fraction: 0.2, erase: true, epochs: 4, batch: 16, rate: 0.01}
  - {pass: affine, method: rtn, bits: 8, group: row}
calibration: {samples: 24}
export: {activations: exact}
"""
    )
    erased = run(options(recipe="erased.yaml", sets=(), output=Path("erased")))
    (step,) = erased.report["structure"]
    gone = [name for name, (left, _) in step["kept_units"].items() if not left]
    assert gone
    assert step["parameters"] == step["training"][-1]["parameters"] <= 0.8 * step["parameters_before"]
    left, whole = (
        sum("Conv" in node.op_type for node in onnx.load(each.directory / "model.onnx").graph.node)
        for each in (erased, artifact)
    )
    assert left < whole
    assert erased.report["proof"]["exact"]["max_relative_error"] < 1e-4
    assert n_parameters(compressor.load("erased", arch="tests.pico:ResNet")) == step["parameters"]


def test_an_interrupted_run_goes_on_to_the_same_bytes(monkeypatch, artifact):
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_SAVES", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(options(output=Path("again"), progress=Interrupting("hesso", 0.6)))
    assert Path("again.partial/work/structure-0-training/training.pt").is_file()
    again = run(options(output=Path("again"), resume=True))
    first, second = ((each.directory / "model.safetensors").read_bytes() for each in (artifact, again))
    assert first == second


def test_two_processes_make_one_artifact(folder, artifact):
    """The whole command under torchrun; batch norms see half of each batch, so that weights are near, not the same."""
    sets = [word for each in SETS for word in ("--set", each)]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compressor", "model.pt",
               "--recipe", "cnn-once", "--data", "training.npz", "--eval", "evaluation.npz", "--arch",
               "tests.pico:ResNet", "--format", "safetensors", "-o", "parallel", *sets]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1, "the first process speaks for all"
    report = json.loads((folder / "parallel" / "compression.json").read_text())
    (step,), (single,) = report["structure"], artifact.report["structure"]
    assert step["parameters"] <= 0.5 * step["parameters_before"]
    assert step["training"][0]["loss"] == pytest.approx(single["training"][0]["loss"], rel=0.5)
    assert not torch.distributed.is_initialized()
