"""Passes that drop weights, in runs: what is dropped stays dropped whatever comes after, and files are smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import RecipeError
from compressor.core.options import RunOptions
from compressor.core.tensors import EncodedTensors
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.run.pipeline import run

TAIL = """
embeddings: {bits: 32}
calibration: {tokens: 512, window: 64}
evaluation: {tokens: 256, window: 64, speed: false}
"""
DOWN = "model.layers.0.mlp.down_proj.weight"


def written(folder: Path, passes: str, rest: str = TAIL) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(f"passes: [{passes}]{rest}")
    return folder / "recipe.yaml"


def compressed(llama: Path, folder: Path, passes: str, format: str = "onnx", rest: str = TAIL):
    recipe = written(folder, passes, rest)
    return run(RunOptions(model=str(llama), recipe=str(recipe), output=folder / "out", format=format))


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    tensors = EncodedTensors([folder / "out" / "model.safetensors"])
    encoded = [name for name in tensors if tensors.describe(name)["kind"] != "dense"]
    assert len(encoded) == 3 * 5, "of three blocks all layers but the small ones"
    return {name: tensors[name].decode() == 0 for name in encoded}


def test_half_is_dropped_and_stored_as_code_words_or_with_a_mask(tmp_path, llama):
    whole = compressed(llama, tmp_path / "a", "{pass: gblm, sparsity: 0.5}")
    masked = compressed(llama, tmp_path / "b", "{pass: gblm, sparsity: 0.5}", "safetensors")
    for name, dropped in zeros(tmp_path / "a").items():
        share = dropped.float().mean(1)
        assert bool((share >= 0.5).all()), name  # of every row; kept weights may round to zero as well
        assert float(share.mean()) < 0.6, name
        assert torch.equal(dropped, zeros(tmp_path / "b")[name])
    assert whole.report["proof"]["exact"]["max_relative_error"] < 1e-3
    kinds = {path: EncodedTensors([tmp_path / path / "out" / "model.safetensors"]) for path in "ab"}
    assert (kinds["a"].describe(DOWN)["kind"], kinds["b"].describe(DOWN)["kind"]) == ("affine", "sparse")
    files = [artifact.report["size"]["files"]["model.safetensors"] for artifact in (whole, masked)]
    assert files[1] < files[0]


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_the_plan_knows_the_bytes_of_a_pruned_network(tmp_path, llama, format):
    text = "{pass: gblm, sparsity: 0.5, score: wanda}"
    artifact = compressed(llama, tmp_path, text, format)
    plan = make_plan(open_checkpoint(llama), load_recipe(tmp_path / "recipe.yaml"), format)
    planned, found = plan.files["model.safetensors"], artifact.report["size"]["files"]["model.safetensors"]
    assert 0.97 * planned < found <= planned  # kept weights that round to zero are not stored


@pytest.mark.parametrize(
    "encoding", ["{pass: affine, method: gptq, bits: 4, group: 32}", "{pass: jlcm, width: 8, dim: 4, group: 32}"]
)
def test_what_is_dropped_stays_dropped_through_encoding_and_distillation(tmp_path, llama, encoding):
    learned = TAIL + "distill: {steps: 6, tokens: 1024, mapping_rate: 0.5, codebook_rate: 1.0}\n"
    compressed(llama, tmp_path, "{pass: gblm, pattern: '2:4', score: sparsegpt}, " + encoding, rest=learned)
    for name, dropped in zeros(tmp_path).items():
        runs = dropped[:, : dropped.shape[1] // 4 * 4].reshape(len(dropped), -1, 4)
        assert bool((runs.sum(2) >= 2).all()), name


def test_shares_are_allocated_and_their_mean_is_the_sparsity(tmp_path, llama):
    compressed(llama, tmp_path, "{pass: gblm, sparsity: 0.6, allocation: importance}", "safetensors")
    found = zeros(tmp_path)
    shares = {name: float(dropped.float().mean()) for name, dropped in found.items()}
    assert max(shares.values()) - min(shares.values()) > 0.02
    total = sum(dropped.numel() for dropped in found.values())
    assert sum(int(dropped.sum()) for dropped in found.values()) / total == pytest.approx(0.6, abs=0.02)


def test_a_grid_without_zero_is_refused_after_pruning(tmp_path, llama):
    recipe = written(tmp_path, "{pass: gblm}, {pass: affine, bits: 2, zero: half}")
    with pytest.raises(RecipeError, match=r"is pruned by gblm, but affine as it is set has no exact zero"):
        make_plan(open_checkpoint(llama), load_recipe(recipe))


def test_gradients_of_two_norms_are_refused(tmp_path, llama):
    recipe = written(tmp_path, "{pass: gblm, select: '*mlp*'}, {pass: gblm, p: 2, select: '*attn*'}")
    with pytest.raises(RecipeError, match="gradients of p 1 and of p 2"):
        make_plan(open_checkpoint(llama), load_recipe(recipe))


def test_pruning_before_a_selected_encoding_leaves_the_rest_at_eight_bits(tmp_path, llama):
    recipe = written(tmp_path, "{pass: gblm}, {pass: affine, bits: 4, select: '*mlp*'}")
    plan = make_plan(open_checkpoint(llama), load_recipe(recipe))
    bits = {tensor.name: tensor.spec.bits for tensor in plan.tensors if tensor.prune}
    assert bits[DOWN] == 4
    assert bits["model.layers.1.self_attn.q_proj.weight"] == 8
