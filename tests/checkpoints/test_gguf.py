"""GGUF files of each family: what is read of them computes what the network did that they were made of."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from tests import pico
from tests.gguf_files import write_gguf
from tests.run import sources

ARCH = gguf.MODEL_ARCH
SMALL = {
    "vocab_size": pico.VOCABULARY, "hidden_size": 80, "intermediate_size": 108, "num_attention_heads": 5,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "num_hidden_layers": 3,
}  # fmt: skip
LOCAL = {"sliding_window": 8}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base": 10000.0}
MULTIPLIERS = {
    "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip
SCALES = {"attention.scale": 0.1, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0}
SHARED = {"num_attention_heads": 4, "query_pre_attn_scalar": 20}
"""Heads whose share of the hidden size is not their keys' width."""
STRETCHED = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
THETAS = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "llama": (ARCH.LLAMA, "Llama", {}, {}),
    "llama, stretched": (ARCH.LLAMA, "Llama", STRETCHED, LINEAR),
    "qwen3": (ARCH.QWEN3, "Qwen3", {"tie_word_embeddings": False}, {}),
    "smollm3": (ARCH.SMOLLM3, "SmolLM3", {"num_hidden_layers": 4}, {"rope.freq_base": 2e6}),
    "granite": (ARCH.GRANITE, "Granite", MULTIPLIERS, SCALES),
    "olmo2": (ARCH.OLMO2, "Olmo2", {}, {}),
    "phi3": (ARCH.PHI3, "Phi3", LOCAL, {"attention.sliding_window": 8}),
    "gemma": (ARCH.GEMMA, "Gemma", {}, {}),
    "gemma2": (
        ARCH.GEMMA2, "Gemma2", {**LOCAL, **CAPS, "query_pre_attn_scalar": 16}, {"attention.sliding_window": 8, **CAPS}
    ),
    "gemma2 of 46 blocks": (
        ARCH.GEMMA2, "Gemma2", {**SHARED, **LOCAL, **CAPS, "num_hidden_layers": 46},
        {"attention.sliding_window": 8, **CAPS},
    ),
    "gemma3": (
        ARCH.GEMMA3, "Gemma3",
        {**LOCAL, "num_hidden_layers": 7, "query_pre_attn_scalar": 16, "rope_parameters": THETAS},
        {**LINEAR, "attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_it_did(name, tmp_path):
    architecture, family, settings, metadata = FAMILIES[name]
    kind = getattr(transformers, f"{family}ForCausalLM")
    module = pico.lively(kind(kind.config_class(**{**SMALL, **settings}, attn_implementation="eager")), 0)
    pico.write_tokenizer(tmp_path)
    write_gguf(module, architecture, tmp_path / "pico.gguf", tmp_path / "tokenizer.json", metadata)
    read = open_checkpoint(tmp_path / "pico.gguf").build("cpu")
    ids = torch.randint(pico.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = module(ids).logits, read(ids).logits
    assert type(read) is kind
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_positions_stretched_by_what_the_metadata_do_not_say_are_refused(kind, tmp_path):
    pico.write_tokenizer(tmp_path)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    metadata = {"rope.scaling.type": kind}
    write_gguf(module, ARCH.LLAMA, tmp_path / "pico.gguf", tmp_path / "tokenizer.json", metadata)
    with pytest.raises(CheckpointError, match=f"rotary scaling '{kind}', whose settings are not in its metadata"):
        open_checkpoint(tmp_path / "pico.gguf")


def test_another_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "pico.gguf", "phi2")
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match="is of architecture 'phi2'; known: gemma, gemma2, gemma3, granite"):
        open_checkpoint(tmp_path / "pico.gguf")


def test_a_plan_counts_the_tokenizer_that_the_artifact_gets(tmp_path):
    sources.SOURCES["gguf"][0](tmp_path / "gguf")
    checkpoint = open_checkpoint(tmp_path / "gguf" / "pico.gguf")
    plan = make_plan(checkpoint, load_recipe("llm-4bit", ["evaluation.tokens=0"]))
    written = {path.name: path.stat().st_size for path in checkpoint.write_tokenizer(tmp_path / "out")}
    assert "tokenizer.json" in written
    assert {name: plan.files[name] for name in written} == written
