"""Layers of every kind are encoded as the plan says, with error feedback where their inputs are rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor.plan.recipe
from compressor.checkpoints import open_checkpoint
from compressor.core.contract import Statistics
from compressor.core.errors import CheckpointError
from compressor.core.tensors import EncodedTensor, EncodedTensors
from compressor.core.work import Work
from compressor.plan.plan import Plan
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.chain import Chain
from compressor.sweeps.encode import encode_network, last_head
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey, survey
from tests import pico
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


def test_a_head_of_its_own_is_encoded_on_what_the_compressed_network_gives_it(tmp_path, monkeypatch):
    monkeypatch.setattr(compressor.plan.recipe, "SMALLEST", 1)
    (tmp_path / "recipe.yaml").write_text(
        "passes: [{pass: affine, method: gptq, bits: 2, group: 16, zero: learned}]\n"
        "embeddings: {bits: 3, group: 16, zero: learned, sweeps: 1}\ncalibration: {token_importance: false}\n"
    )
    checkpoint = open_checkpoint(pico.llama(tmp_path / "llama", tied=False))
    recipe, batches, given = load_recipe(tmp_path / "recipe.yaml"), pico.token_batches(), list[Statistics]()
    network, work = Network(checkpoint, fast=False), Work(tmp_path / "work", 0)
    (tmp_path / "work").mkdir()
    plain = Chain.of_layer

    def of_layer(self: Chain, name: str, module: nn.Module, known: Statistics, *rest: Any) -> EncodedTensor:
        given.extend([known] * (name == "lm_head.weight"))
        return plain(self, name, module, known, *rest)

    monkeypatch.setattr(Chain, "of_layer", of_layer)
    assert last_head(network, batches, recipe) == "lm_head.weight"
    tensors, files = encode_network(
        network, batches, recipe, make_plan(checkpoint, recipe), Survey(), work, lambda note: None
    )
    whole = checkpoint.build()
    checkpoint.materialise(whole, list(whole.state_dict()))
    for name, parameter in whole.named_parameters():
        if name != "lm_head.weight":
            parameter.data = tensors[name].decode().float()
    rows = []
    whole.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            whole(**batch)
    moment = torch.cat(rows).T @ torch.cat(rows) / len(torch.cat(rows))
    found = given[0].hessian
    assert len(given) == 1
    assert found is not None
    torch.testing.assert_close(found, moment / moment.diagonal().mean(), rtol=1e-3, atol=1e-4)
    assert files[-1].name.startswith("head")


def encoded_llama(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> EncodedTensors:
    pico.rewrite(pico.llama(folder), change)
    (folder / "recipe.yaml").write_text("""
passes: [{pass: affine, method: gptq, bits: 4, group: 16}]
calibration: {token_importance: false}
""")
    checkpoint, recipe = open_checkpoint(folder), load_recipe(folder / "recipe.yaml")
    network, batches, work = Network(checkpoint, fast=False), pico.token_batches(), Work(folder / "work", 0)
    work.folder.mkdir()
    known = survey(network, batches, work.folder / "scratch", False, torch.Generator())
    return encode_network(network, batches, recipe, make_plan(checkpoint, recipe), known, work, lambda note: None)[0]


def test_a_network_that_computes_no_numbers_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="'model.embed_tokens.weight': what reaches it, or its square"):
        encoded_llama(tmp_path, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].mul_(1e30))


def test_a_network_of_zeros_is_encoded(tmp_path):
    tensors = encoded_llama(tmp_path, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    assert not any(bool(tensors[name].decode().any()) for name in tensors)


def test_a_head_that_is_the_table_too_comes_first(tmp_path):
    (tmp_path / "recipe.yaml").write_text("passes: [{pass: affine, method: gptq, bits: 2, group: 16}]")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    tied, own = (Network(open_checkpoint(pico.llama(tmp_path / str(each), tied=each))) for each in (True, False))
    batches = pico.token_batches()
    assert last_head(tied, batches, recipe) is None
    assert last_head(own, batches, recipe, Survey(head_moment=torch.eye(3))) is None
    assert last_head(own, [], recipe) is None
