"""The recipe cnn-int8 from a checkpoint to an artifact: int8 kernels, exact sizes, quality; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import compressor.evaluate.session
from compressor.checkpoints import open_checkpoint
from compressor.core.errors import DataError, UsageError
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors
from compressor.evaluate.session import open_session
from compressor.export import rewriting
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.run.pipeline import run
from compressor.runtime.sessions import open_inference, optimised_graph
from tests import pico

SETS = ("calibration.samples=24", "evaluation.speed=false")


@pytest.fixture(scope="module", autouse=True)
def folder(module_here):
    """Images for calibration and evaluation, and two networks."""
    generator = np.random.default_rng(0)
    for name, n in (("calibration", 24), ("evaluation", 40)):
        images = generator.standard_normal((n, 3, 12, 12)).astype(np.float32)
        np.savez(module_here / f"{name}.npz", image=images)
    pico.write_state_dict(pico.ResNet, module_here / "model.pt")
    pico.write_state_dict(pico.Tied, module_here / "tied.pt")
    return module_here


def options(**changes) -> RunOptions:
    known = {"recipe": "cnn-int8", "data": "calibration.npz", "eval": "evaluation.npz", "sets": SETS}
    return RunOptions(**({"model": "model.pt", "output": Path("out"), "arch": "tests.pico:ResNet"} | known | changes))


@pytest.fixture(scope="module", autouse=True)
def everything():
    """All that can compute on int8 does: these networks are too small for any of it to pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewriting, "regions", lambda operations, shapes, weights: list(operations))
        yield


@pytest.fixture(scope="module")
def artifact(folder):
    """Measured without saturating sums of pairs, which processors without VNNI have: on every machine the same."""

    def opened(path, settings, apart):
        return open_inference(
            path, replace(settings, entries=settings.entries | {"session.x64quantprecision": "1"}), apart
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressor.evaluate.session, "open_inference", opened)
        return run(options(output=Path("artifact")))


def test_an_artifact_computes_in_int8_and_is_as_large_as_planned(artifact, tmp_path):
    checkpoint = open_checkpoint("model.pt", arch="tests.pico:ResNet")
    plan = make_plan(checkpoint, load_recipe("cnn-int8", SETS))
    report = artifact.report
    sizes = report["size"]["files"]
    assert sizes["model.safetensors"] == plan.files["model.safetensors"]
    assert sizes["model.onnx"] == pytest.approx(plan.files["model.onnx"], rel=0.4)
    assert report["proof"]["exact"]["max_relative_error"] < 1e-5
    assert report["proof"]["as_shipped"]["max_relative_error"] < 0.05
    assert report["quality"]["top1_agreement"] > 0.9
    assert report["quality"]["mean_relative_error"] < 0.02
    operators = [node.op_type for node in ir.load(optimised_graph(artifact.directory / "model.onnx", tmp_path)).graph]
    assert operators.count("QLinearConv") == 6, "all but the stem"
    assert operators.count("QLinearAdd") == 2


def test_every_convolution_is_stored_in_eight_bits_and_the_means_are_corrected(artifact):
    plain = run(options(output=Path("plain"), sets=(*SETS, "calibration.correct_means=false")))
    corrected, kept = (EncodedTensors([each.directory / "model.safetensors"]) for each in (artifact, plain))
    assert corrected.describe("depthwise.weight")["bits"] == 8
    moved = {name for name in corrected if not torch.equal(corrected[name].decode(), kept[name].decode())}
    assert {"stem.bias", "blocks.0.norm1.running_mean", "depthwise.bias"} <= moved
    assert all(name.endswith(("bias", "running_mean")) for name in moved)


def test_the_same_run_gives_the_same_bytes(artifact):
    again = run(options(output=Path("again"))).directory
    for name in ("model.onnx", "model.safetensors"):
        assert (again / name).read_bytes() == (artifact.directory / name).read_bytes()


def test_an_artifact_without_static_ranges_computes_on_floats():
    artifact = run(options(output=Path("floats"), sets=(*SETS, "export.activations=int8")))
    assert artifact.report["proof"]["as_shipped"]["max_relative_error"] < 0.02
    assert open_session(artifact.directory).outputs == ["output"]


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"recipe": "jlcm.yaml", "sets": ()}, UsageError,
     r"'stem.weight' cannot be written to ONNX: activations: static_int8 needs .*; found codebook"),
    ({"sets": ("affine.bits=4",)}, UsageError, "found bits 4"),
    ({"sets": ("affine.group=16",)}, UsageError, "groups of 16"),
    ({"sets": ("affine.zero=learned",)}, UsageError, "zero learned"),
    ({"model": "tied.pt", "arch": "tests.pico:Tied"}, UsageError,
     "no convolution of tied.pt is encoded; write activations: int8"),
    ({"data": None}, DataError, "recipe 'cnn-int8' calibrates"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_before_work_begins(folder, changes, error, message):
    (folder / "jlcm.yaml").write_text("passes: [{pass: jlcm}]\nexport: {activations: static_int8}")
    with pytest.raises(error, match=message):
        run(options(**changes))
    assert not Path("out.partial").exists()
