"""Mixtures of experts: each expert's statistics are those of the tokens that are sent to it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.evaluate.session import open_session
from compressor.graph.blocks import layers
from compressor.sweeps.moments import groups_of, layer_stages, moments_of
from compressor.sweeps.network import Network
from compressor.sweeps.survey import survey
from tests import pico

N_EXPERTS = 4


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    config = transformers.MixtralConfig(
        hidden_size=72, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
        vocab_size=pico.VOCABULARY, num_local_experts=N_EXPERTS, num_experts_per_tok=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return pico.saved(config, transformers.MixtralForCausalLM, tmp_path_factory.mktemp("mixtral"))


def test_the_experts_of_a_layer_are_gone_through_together(mixtral):
    network = Network(open_checkpoint(mixtral), fast=False)
    for name, block, reached in network.sweep(pico.token_batches()):
        stages = [stage for stage in layer_stages(network, block, f"{name}.", reached[0]) if not stage.share]
        stem = f"{name}.mlp.experts"
        assert [stage.names for stage in stages] == [
            [f"{stem}.{i}.{layer}.weight" for i in range(N_EXPERTS)] for layer in ("gate_up_proj", "down_proj")
        ]


@torch.no_grad()
def test_moments_are_of_the_tokens_that_reach_an_expert(mixtral):
    module, batches = open_checkpoint(mixtral).build("cpu"), pico.token_batches()
    caught: dict[str, list[torch.Tensor]] = {}
    for name, layer in layers(module).items():
        if ".experts." in name:
            layer.register_forward_pre_hook(lambda _, args, name=name: caught.setdefault(name, []).append(args[0]))
    for batch in batches:
        module(**batch, use_cache=False)
    network = Network(open_checkpoint(mixtral), fast=False)
    found = {}
    for name, block, reached in network.sweep(batches):
        inside = layers(block, f"{name}.")
        for stage in layer_stages(network, block, f"{name}.", reached[0]):
            for due in groups_of(stage, inside, inside) if not stage.share else ():
                found |= moments_of(network, block, inside, due, stage, reached, {})
    assert found.keys() == caught.keys()
    for name, inputs in caught.items():
        rows = torch.cat(inputs)
        assert found[name][1] == len(rows)
        if len(rows):
            torch.testing.assert_close(found[name][0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_reaches_counts_every_input_alike(mixtral):
    """Of one token, which goes to two of four."""
    network = Network(open_checkpoint(mixtral), fast=False)
    for name, block, reached in network.sweep([{"input_ids": torch.tensor([[5]])}]):
        inside = layers(block, f"{name}.")
        stage = next(stage for stage in layer_stages(network, block, f"{name}.", reached[0]) if not stage.share)
        found = moments_of(network, block, inside, stage.names, stage, reached, {})
        unreached = [moment for moment, n_tokens in found.values() if n_tokens == 0]
        assert len(unreached) == N_EXPERTS - 2
        assert all(torch.equal(moment, torch.eye(72)) for moment in unreached)


def test_an_experts_tokens_have_no_importance_but_it_has_a_scale(mixtral, tmp_path):
    network = Network(open_checkpoint(mixtral), fast=False)
    found = survey(network, pico.token_batches(), tmp_path, True, torch.Generator().manual_seed(0), lambda: None)
    experts = [name for name in found.scales if ".experts." in name]
    assert len(experts) == 2 * 2 * N_EXPERTS
    assert not [name for name in found.importance if ".experts." in name]
    assert all(scale >= 0 for scale in found.scales.values())


RECIPE = """
name: mixture
passes: [{pass: affine, method: gptq, bits: 4, group: 32}]
calibration: {tokens: 16, window: 16, token_importance: false}
evaluation: {tokens: 96, window: 32, speed: false}
"""


def test_a_mixture_is_compressed_with_its_cache_and_who_was_not_reached_is_named(mixtral, tmp_path, caplog):
    """The text is one word, over and over, which goes to few experts."""
    (tmp_path / "mixture.yaml").write_text(RECIPE)
    (tmp_path / "word.txt").write_text("water " * 200)
    (tmp_path / "text.txt").write_text(pico.text(3))
    with caplog.at_level(logging.WARNING, logger="compressor"):
        compressor.compress(mixtral, str(tmp_path / "mixture.yaml"), output=tmp_path / "out",
                            data=str(tmp_path / "word.txt"), eval=str(tmp_path / "text.txt"))  # fmt: skip
    assert "no token of the calibration data reaches model.layers." in caplog.text
    session, module = open_session(tmp_path / "out", exact=True), compressor.load(tmp_path / "out")
    assert session.past  # type: ignore[attr-defined]
    ids = np.random.default_rng(3).integers(0, pico.VOCABULARY, (2, 12))
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(session.logits(ids) - expected).max() < 0.02 * np.abs(expected).max()  # type: ignore[attr-defined]
