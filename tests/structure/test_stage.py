"""Narrower transformers by encoder-heads and llm-width; shares, multiplications and biases by definition."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError, RecipeError
from compressor.core.options import RunOptions
from compressor.graph.compensation import compensate, mean_inputs, readers
from compressor.graph.cost import multiplications, positions
from compressor.graph.groups import find_groups
from compressor.graph.surgery import remove_units
from compressor.ops.attribution import start_of
from compressor.ops.selection import even_share
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.plan.sizes import smaller_bytes
from compressor.run.pipeline import run
from compressor.structure.stage import next_tokens
from tests import pico
from tests.learning import training_case

EXAMPLE = {"input_ids": torch.arange(40).view(2, 20)}


@pytest.fixture(scope="module", autouse=True)
def folder(module_here, bert):
    """A decoder of 8 heads on 4, an encoder, texts."""
    config = transformers.LlamaConfig(
        vocab_size=pico.VOCABULARY, hidden_size=80, intermediate_size=108, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    pico.saved(config, transformers.LlamaForCausalLM, module_here / "llama")
    (module_here / "bert").symlink_to(bert)
    for seed in (1, 2):
        (module_here / f"{seed}.txt").write_text(pico.text(seed))
    return module_here


def options(model: str, recipe: str, name: str, *sets: str) -> RunOptions:
    known = ("calibration.tokens=1024", "calibration.window=64", "lrp.step=0.25", "evaluation.speed=false", *sets)
    return RunOptions(model, recipe, Path(name), data="1.txt", eval="2.txt", sets=known, force=True)


def test_a_decoder_becomes_narrower_and_its_config_says_so():
    sets = ("lrp.fraction=0.25", "evaluation.tokens=256", "evaluation.window=32")
    artifact = run(options("llama", "llm-width", "narrow", *sets))
    config = json.loads(Path("narrow/config.json").read_text())
    sizes = [config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")]
    assert sizes == [6, 3, 16, 81]
    assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-5
    assert artifact.report["structure"][0]["new_biases"] == 4
    module = compressor.load("narrow")
    assert module.model.layers[1].self_attn.q_proj.weight.shape == (96, 80)
    assert module.model.layers[1].mlp.down_proj.bias.abs().max() > 0


def test_four_bits_follow_a_narrower_decoder(folder):
    (folder / "both.yaml").write_text(
        "passes:\n  - {pass: lrp, criterion: taylor, fraction: 0.25, of: units, spread: group, compensate: bias}\n"
        "  - {pass: affine, bits: 4, group: 16}\nevaluation: {tokens: 256, window: 32, speed: false}\n"
    )
    artifact = run(options("llama", "both.yaml", "both"))
    assert artifact.report["proof"]["exact"]["max_relative_error"] < 1e-4


def test_layers_of_different_width_are_refused_in_a_decoder():
    with pytest.raises(CheckpointError, match="write spread: group"):
        run(options("llama", "llm-width", "uneven", "lrp.spread=kind", "lrp.fraction=0.25"))


def test_an_encoder_loses_heads_and_neurons_and_learns_from_the_original():
    removed = run(options("bert", "encoder-heads", "removed", "lrp.epochs=0", "lrp.compensate=none"))
    taught = run(options("bert", "encoder-heads", "taught", "lrp.epochs=8", "lrp.rate=0.003", "lrp.batch=4"))
    kept = [left / size for left, size in removed.report["structure"][0]["kept_units"].values()]
    assert sum(share < 1 for share in kept) >= 2
    assert removed.report["proof"]["exact"]["max_relative_error"] < 1e-4
    training = taught.report["structure"][0]["training"]
    assert training[-1]["loss"] < training[0]["loss"]
    assert taught.report["quality"]["kl_divergence"] < removed.report["quality"]["kl_divergence"]


@pytest.mark.parametrize(("model", "recipe"), [("llama", "llm-width"), ("bert", "encoder-heads")])
def test_the_plan_predicts_the_bytes_of_the_weights(model, recipe):
    settings = load_recipe(recipe, ["lrp.fraction=0.25", "lrp.epochs=0"])
    plan = make_plan(open_checkpoint(model), settings)
    expected = smaller_bytes(settings, plan.tensors)
    asked = options(model, recipe, "planned", "lrp.fraction=0.25", "lrp.epochs=0")
    run(dataclasses.replace(asked, format="safetensors"))
    written = Path("planned/model.safetensors").stat().st_size
    assert expected < sum(tensor.bytes_after for tensor in plan.tensors)
    assert written == pytest.approx(expected, rel=0.15)


def test_every_kind_loses_the_same_share():
    scores = [torch.arange(8.0), torch.arange(8.0) + 100, torch.arange(40.0)]
    gone = [torch.zeros(len(each), dtype=torch.bool) for each in scores]

    def amount(flags):
        return sum(int(each.sum()) for each in flags) / 56

    kinds = even_share(scores, gone, [1, 1, 1], ["head", "head", "neuron"], 0.25, amount)
    assert [int(flags.sum()) for flags in kinds] == [4, 0, 10]
    alike = even_share(scores, gone, [1, 1, 1], [0, 1, 2], 0.25, amount)
    assert [int(flags.sum()) for flags in alike] == [2, 2, 10]
    assert alike[1].nonzero()[:, 0].tolist() == [0, 1]
    most = even_share(scores, gone, [1, 1, 1], [0, 1, 2], float("inf"), amount)
    assert [int(flags.sum()) for flags in most] == [7, 7, 39]


def test_multiplications_are_counted_as_by_hand():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(),
                           nn.Linear(6 * 16, 5))  # fmt: skip
    batch = {"": torch.randn(2, 3, 8, 8)}
    at = positions(module, lambda m, b: m(b[""]), batch)
    assert at == {"0.weight": 16, "2.weight": 16, "4.weight": 1}
    assert multiplications(module, {}, at) == 16 * 8 * 27 + 16 * 48 + 480
    group = next(group for group in find_groups(module, (batch[""],)) if group.name == "0")
    assert multiplications(module, {group: torch.tensor([0, 3])}, at) == 16 * 6 * 27 + 16 * 36 + 480


def test_biases_keep_the_mean_of_what_units_added():
    """float64: mean output without the units and with the biases is the original's."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 5, bias=False)).double()
    batches = [{"": torch.randn(50, 7, dtype=torch.float64)} for _ in range(3)]
    group = next(group for group in find_groups(module, (batches[0][""],)) if not group.reason)
    removal = {group: torch.tensor([1, 4, 11])}
    smaller = remove_units(module, removal)
    means = mean_inputs(module, list(readers(module, removal)), lambda m, b: m(b[""]), batches)
    assert compensate(smaller, module, removal, means) == ["2.bias"]
    x = torch.cat([batch[""] for batch in batches])
    torch.testing.assert_close(smaller(x).mean(0), module(x).mean(0))


def test_language_models_start_at_the_next_token():
    tokens, generator = torch.tensor([[3, 1, 2]]), torch.Generator()
    labels = next_tokens(tokens)
    assert labels.tolist() == [[1, 2, -100]]
    logits = torch.randn(1, 3, 4)
    gradient = start_of(logits, labels, "taylor", generator)
    wanted = logits.clone().requires_grad_()
    nn.functional.cross_entropy(wanted[0], labels[0], reduction="sum").backward()
    torch.testing.assert_close(gradient, wanted.grad)
    relevance = start_of(logits, labels, "lrp", generator)
    assert float((relevance * logits).sum()) == pytest.approx(1)


def test_a_budget_of_multiplications_is_kept_and_an_impossible_one_refused_first():
    from compressor.passes.registry import load_pass
    from compressor.passes.settings.lrp import LrpSettings

    module = training_case.residual()
    subject = training_case.subject_of(copy.deepcopy(module))
    method = load_pass(LrpSettings(criterion="magnitude", fraction=0.3, of="flops"))
    smaller = method.restructure(subject).module
    surgeon = training_case.subject_of(module).surgeon
    before = surgeon.multiplications(module, {})
    assert 0.55 * before < surgeon.multiplications(smaller, {}) <= 0.7 * before
    with pytest.raises(RecipeError, match="of the flops can go with most"):
        load_pass(LrpSettings(criterion="magnitude", fraction=0.99, of="flops")).restructure(
            training_case.subject_of(module)
        )


def test_inputs_of_layers_are_averaged_over_positions():
    module = nn.Sequential(nn.Linear(3, 4))
    x = torch.randn(2, 5, 3)
    means = mean_inputs(module, ["0"], lambda m, b: m(b[""]), [{"": x}])
    np.testing.assert_allclose(means["0"].numpy(), x.double().mean((0, 1)).numpy())
