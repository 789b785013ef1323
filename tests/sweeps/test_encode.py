"""Layers of every kind are encoded as the plan says, with error feedback where their inputs are rows of a matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError
from compressor.core.tensors import EncodedTensors
from compressor.core.work import Work
from compressor.plan.plan import Plan
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.encode import encode_network
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey
from tests.pico import lively


class Mixed(nn.Module):
    """Convolutions of two geometries on one input, a grouped, a transposed and a three-dimensional one, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(16, 256, 1), nn.Conv2d(16, 32, 3, padding=1)
        self.grouped, self.up = nn.Conv2d(288, 288, 3, padding=1, groups=16), nn.ConvTranspose2d(288, 16, 2, stride=2)
        self.deep = nn.Conv3d(2, 256, (8, 2, 1))
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.narrow(x), self.wide(x)], 1)
        x = self.up(torch.relu(self.grouped(x)))
        x = self.deep(x.unflatten(1, (2, 8))).flatten(2).mean(2).view(-1, 4, 64)
        return self.attention(x, x, x)[0].flatten(1)


def encoded(folder: Path, recipe: str, size: float = 1.0) -> tuple[EncodedTensors, Plan]:
    network = lively(Mixed(), 0)
    network.narrow.weight.data *= size
    torch.save(network.state_dict(), folder / "mixed.pt")
    (folder / "recipe.yaml").write_text(recipe)
    checkpoint = open_checkpoint(folder / "mixed.pt", arch="tests.sweeps.test_encode:Mixed")
    loaded = load_recipe(folder / "recipe.yaml")
    plan = make_plan(checkpoint, loaded)
    batches = [{"": torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    (folder / "work").mkdir()
    work = Work(folder / "work", 0)
    tensors, _ = encode_network(Network(checkpoint), batches, loaded, plan, Survey(), work, lambda note: None)
    return tensors, plan


@pytest.mark.parametrize("step", [
    "{pass: affine, method: gptq, bits: 8, group: 16}", "{pass: affine, method: rtn, bits: 8, group: row}",
    "{pass: jlcm, width: 4, dim: 2, group: 16}",
])  # fmt: skip
def test_what_is_encoded_is_what_was_planned(tmp_path, step):
    tensors, plan = encoded(tmp_path, f"passes: [{step}]")
    kinds = {name: tensors.describe(name)["kind"] for name in tensors}
    assert kinds == {tensor.name: tensor.spec.kind for tensor in plan.tensors}
    assert {name for name, kind in kinds.items() if kind != "dense"} == {
        f"{name}.weight" for name in ("narrow", "wide", "grouped", "up", "deep", "attention.out_proj")
    }
    original = torch.load(tmp_path / "mixed.pt")
    for name in tensors:
        error = (tensors[name].decode() - original[name]).norm() / original[name].norm().clamp_min(1e-9)
        assert error < (0.02 if "bits: 8" in step else 0.6), name


@pytest.mark.parametrize("size", [1e7, 1e30])
@pytest.mark.parametrize("step", [
    "{pass: affine, method: rtn, bits: 4, group: row}", "{pass: affine, method: gptq, bits: 4, group: 16}",
    "{pass: jlcm, width: 4, dim: 2, group: 16}", "{pass: trellis, width: 4, window: 6, group: 16}",
])  # fmt: skip
def test_weights_whose_scales_are_beyond_float16_are_refused_by_name(tmp_path, step, size):
    with pytest.raises(CheckpointError, match="'narrow.weight': its weights are too large to be encoded"):
        encoded(tmp_path, f"passes: [{step}]", size)
