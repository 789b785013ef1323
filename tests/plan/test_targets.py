"""What --target-flops and --target-size leave of a network whose recipe removes units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.core.errors import UsageError
from compressor.core.options import RunOptions
from compressor.graph.cost import multiplications, positions
from compressor.plan.recipe_file import load_recipe
from compressor.plan.targets import aimed
from compressor.run.pipeline import run
from scripts.networks import resnet20
from tests import pico

ARCH = "scripts.networks:resnet20"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ResNet-20 of random weights, and data for it."""
    folder = tmp_path_factory.mktemp("aim")
    pico.write_state_dict(resnet20, folder / "model.pt")
    images = np.random.default_rng(0).standard_normal((24, 1, 14, 14)).astype(np.float32)
    np.savez(folder / "images.npz", image=images)
    (folder / "prune.yaml").write_text(
        "passes: [{pass: lrp, criterion: taylor, step: 0.25}]\ncalibration: {samples: 16}\n"
        "evaluation: {tokens: 0, speed: false}\n"
    )
    (folder / "students.yaml").write_text("passes: [{pass: n2n}]\n")
    return folder


def options(folder: Path, output: str = "out", **targets) -> RunOptions:
    return RunOptions(
        str(folder / "model.pt"), str(folder / "prune.yaml"), folder / output, arch=ARCH,
        data=str(folder / "images.npz"), **targets,
    )  # fmt: skip


def cost(module: torch.nn.Module) -> int:
    example = {"": torch.zeros(1, 1, 14, 14)}
    return multiplications(module, {}, positions(module, lambda net, batch: net(batch[""]), example))


def test_so_many_multiplications_are_left(folder):
    artifact = run(options(folder, target_flops=0.5, format="safetensors"))
    left = cost(compressor.load(artifact.directory, arch=ARCH)) / cost(resnet20())
    assert 0.47 < left <= 0.5


def test_so_many_bytes_are_left(folder):
    target = 600_000
    artifact = run(options(folder, "small", target_size=target))
    assert 0.97 * target < artifact.report["size"]["bytes"] <= target
    assert artifact.report["recipe"]["gates"]["max_size"] == target


def test_a_loss_is_a_gate_where_nothing_is_encoded(folder):
    given = options(folder, max_loss=0.05)
    left, recipe = aimed(given, load_recipe(given.recipe), open_checkpoint(given.model, arch=ARCH))
    assert not left.allocates and recipe.gates.max_loss == 0.05


@pytest.mark.parametrize(
    ("recipe", "targets", "words"),
    [
        ("prune.yaml", {"target_size": 5_000_000}, "as it is"),
        ("prune.yaml", {"target_size": 10_000}, "leaves nothing"),
        ("cnn-int8", {"target_flops": 0.5}, "0 passes of cnn-int8 remove a share"),
        ("students.yaml", {"target_size": 600_000}, "0 passes of students remove a share"),
    ],
)
def test_what_no_pass_can_leave_is_refused(folder, recipe, targets, words):
    recipe = str(folder / recipe) if recipe.endswith("yaml") else recipe
    with pytest.raises(UsageError, match=words):
        aimed(options(folder, **targets), load_recipe(recipe), open_checkpoint(folder / "model.pt", arch=ARCH))


def test_widths_are_chosen_where_something_is_encoded(folder):
    (folder / "both.yaml").write_text("passes: [{pass: lrp}, {pass: affine}]\n")
    given = options(folder, target_size=200_000, target_flops=0.5)
    left, recipe = aimed(given, load_recipe(str(folder / "both.yaml")), open_checkpoint(given.model, arch=ARCH))
    assert left.target_size == 200_000 and left.target_flops is None
    assert (recipe.structure[0].settings.of, recipe.structure[0].settings.fraction) == ("flops", 0.5)
