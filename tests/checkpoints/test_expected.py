"""What a config tells by itself, held against the modules of transformers; and how many positions a network has."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressor.checkpoints import open_checkpoint, skeleton
from compressor.checkpoints.expected import expected_tensors
from compressor.checkpoints.positions import positions_of
from compressor.core.errors import CheckpointError
from tests import pico

LLAMA = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32}
BERT = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
    "max_position_embeddings": 32,
}  # fmt: skip
KNOWN = [
    ("LlamaForCausalLM", LLAMA),
    ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", LLAMA | {"head_dim": 16, "num_key_value_heads": None}),
    ("MistralForCausalLM", LLAMA | {"head_dim": 8, "sliding_window": 16}),
    ("Qwen2ForCausalLM", LLAMA),
    ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 1}),
    ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    ("GPT2LMHeadModel", GPT2),
    ("GPT2LMHeadModel", GPT2 | {"n_inner": 40, "tie_word_embeddings": False}),
    ("BertForMaskedLM", BERT),
    ("BertModel", BERT | {"type_vocab_size": 1}),
]


def saved(kind: str, settings: dict, folder):
    model = getattr(transformers, kind)
    model(model.config_class(**settings)).save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize(("kind", "settings"), KNOWN, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(KNOWN)])
def test_a_config_tells_the_tensors_that_the_module_has(kind, settings, tmp_path, monkeypatch):
    checkpoint, built = saved(kind, settings, tmp_path), open_checkpoint(tmp_path)
    assert expected_tensors(checkpoint.config) == {name: info.shape for name, info in checkpoint.tensors.items()}
    skeleton.check(built, skeleton.construct(built.blueprint, built.config))
    monkeypatch.setattr(skeleton, "construct", lambda *_: pytest.fail("the module was built"))
    checkpoint.check()
    without_places = {name: replace(info, place=None, groups=None) for name, info in built.tensors.items()}
    assert (checkpoint.tensors, checkpoint.tied, checkpoint.skipped) == (without_places, built.tied, built.skipped)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 50}, {"pad_token_id": 96}, {"num_key_value_heads": 4}, {"rms_norm_eps": "small"},
        {"hidden_act": "nothing"}, {"a_key_of_its_own": 1}, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"architectures": ["LlamaModel"]}, {"model_type": "gemma"}, {"vocab_size": None}, {"use_cache": 1},
        {"layer_types": ["full_attention"]},
    ],
    ids=str,
)  # fmt: skip
def test_where_a_setting_is_unusual_the_module_is_asked(change):
    usual = transformers.LlamaConfig(**LLAMA).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    known = {key: usual[key] for key in (*LLAMA, "architectures", "model_type", "rope_parameters", "pad_token_id")}
    assert expected_tensors(known) is not None
    assert expected_tensors(known | change) is None


def test_a_tensor_that_is_missing_is_told_by_the_module(tmp_path):
    saved("LlamaForCausalLM", LLAMA, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' of shape .* is missing"):
        open_checkpoint(tmp_path).check()


def test_buffers_of_older_files_are_no_tensors_of_the_plan(tmp_path, monkeypatch):
    saved("BertModel", BERT, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"embeddings.position_ids": torch.arange(32)[None]}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint, built = open_checkpoint(tmp_path), open_checkpoint(tmp_path)
    built.build()
    monkeypatch.setattr(skeleton, "construct", lambda *_: pytest.fail("the module was built"))
    checkpoint.check()
    assert checkpoint.tensors == built.tensors
    assert "embeddings.position_ids" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "max_position_embeddings": 2048}, 2048),
        ({"model_type": "gpt2", "n_positions": 64}, 64),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "bloom"}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "many"}, None),
        (None, None),
    ],
)
def test_positions_are_what_a_text_may_have(config, expected):
    assert positions_of(config) == expected


def test_a_text_as_long_as_the_positions_is_computed_and_a_longer_one_is_not(tmp_path):
    """That the rule is the network's own: roberta's table has two rows for what comes before a text."""
    config = transformers.RobertaConfig(**BERT | {"max_position_embeddings": 34}, pad_token_id=1)
    directory = pico.saved(config, transformers.RobertaModel, tmp_path / "roberta")
    positions = positions_of(json.loads((directory / "config.json").read_text()))
    module = transformers.RobertaModel.from_pretrained(directory)
    module(input_ids=torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        module(input_ids=torch.full((1, positions + 1), 5))
