"""Checkpoints whose tensors transformers renames, cuts, stacks or computes as it loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.experts import Experts
from compressor.core.errors import CheckpointError
from tests import pico

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 53, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": None}  # fmt: skip
MIXTURE = {**TEXT, "num_key_value_heads": 2, "num_experts_per_tok": 2}
PYRAMID = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
           "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}  # fmt: skip
PICOS = {
    "ViTForImageClassification": IMAGE,
    "DeiTForImageClassification": IMAGE,
    "BeitForImageClassification": IMAGE,
    "Dinov2Model": IMAGE,
    "SwinForImageClassification": {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
                                   "num_heads": [2, 2], "window_size": 2},
    "SegformerForSemanticSegmentation": {**PYRAMID, "decoder_hidden_size": 16},
    "YolosForObjectDetection": {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 3},
    "ViTMAEModel": IMAGE,
    "GPTNeoXForCausalLM": TEXT,
    "MarianMTModel": {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
                      "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 53,
                      "pad_token_id": 52, "decoder_start_token_id": 52, "eos_token_id": 0, "bos_token_id": None,
                      "max_position_embeddings": 32},
    "BartModel": {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
                  "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 53,
                  "max_position_embeddings": 32},
}  # fmt: skip
MIXTURES = {
    "MixtralForCausalLM": {**MIXTURE, "num_local_experts": 3},
    "OlmoeForCausalLM": {**MIXTURE, "num_experts": 3},
    "Qwen3MoeForCausalLM": {**MIXTURE, "num_experts": 3, "moe_intermediate_size": 16, "head_dim": 8},
    "Qwen2MoeForCausalLM": {**MIXTURE, "num_experts": 3, "moe_intermediate_size": 16,
                            "shared_expert_intermediate_size": 16},
    "GraniteMoeForCausalLM": {**MIXTURE, "num_local_experts": 3},
    "GptOssForCausalLM": {**MIXTURE, "num_local_experts": 3, "head_dim": 8,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "DeepseekV3ForCausalLM": {**MIXTURE, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16,
                              "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 12,
                              "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}  # fmt: skip


def saved(name: str, settings: dict, folder: Path) -> torch.nn.Module:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    module = kind(kind.config_class(**settings)).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    module.save_pretrained(folder)
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", PICOS)
def test_what_transformers_loads_is_loaded_bit_for_bit(name, tmp_path):
    wanted = saved(name, PICOS[name], tmp_path).state_dict()
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    found = checkpoint.build("cpu").state_dict()
    assert found.keys() == wanted.keys()
    assert [each for each in wanted if not torch.equal(found[each], wanted[each])] == []
    assert checkpoint.skipped == []


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_computes_the_same_with_a_linear_for_each(name, tmp_path):
    wanted = saved(name, MIXTURES[name], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    module = checkpoint.build("cpu")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, wanted(ids).logits)
    mixtures = [each for each in module.modules() if isinstance(each, Experts)]
    assert mixtures
    assert all(info.shape == tuple(module.get_parameter(name).shape) for name, info in checkpoint.tensors.items()
               if ".experts." in name)  # fmt: skip
    assert not any(parameter.dim() > 2 for parameter in module.parameters())


def test_an_expert_is_read_from_its_own_tensors_alone(tmp_path, monkeypatch):
    saved("MixtralForCausalLM", MIXTURES["MixtralForCausalLM"], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    original, read = checkpoint.source.original, []
    once = type(original).read
    monkeypatch.setattr(type(original), "read", lambda self, name: (read.append(name), once(self, name))[1])
    matrix = checkpoint.read("model.layers.1.mlp.experts.2.gate_up_proj.weight")
    stem = "model.layers.1.block_sparse_moe.experts.2"
    assert sorted(read) == [f"{stem}.w1.weight", f"{stem}.w3.weight"]
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(matrix, torch.cat([stored[f"{stem}.w1.weight"], stored[f"{stem}.w3.weight"]]))


def test_an_expert_of_a_stacked_tensor_is_read_as_a_row(tmp_path, monkeypatch):
    saved("GraniteMoeForCausalLM", MIXTURES["GraniteMoeForCausalLM"], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    whole = load_file(tmp_path / "model.safetensors")["model.layers.0.block_sparse_moe.output_linear.weight"]
    monkeypatch.setattr(type(checkpoint.source.original), "read", lambda self, name: pytest.fail(f"reads all {name}"))
    assert torch.equal(checkpoint.read("model.layers.0.block_sparse_moe.experts.1.down_proj.weight"), whole[1])


def test_a_missing_expert_is_named(tmp_path):
    saved("MixtralForCausalLM", MIXTURES["MixtralForCausalLM"], tmp_path)
    stem = "model.layers.1.block_sparse_moe.experts.2"
    pico.rewrite(tmp_path, lambda stored: [stored.pop(f"{stem}.{part}.weight") for part in ("w1", "w2", "w3")])
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.experts\.2\.\w+\.weight' .* is missing"):
        open_checkpoint(tmp_path).check()


def test_what_a_rule_cannot_be_applied_to_is_refused(tmp_path):
    saved("MixtralForCausalLM", MIXTURES["MixtralForCausalLM"], tmp_path)
    wrong = {"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.zeros(40, 20)}
    pico.rewrite(tmp_path, lambda stored: stored.update(wrong))
    with pytest.raises(CheckpointError, match=r"transformers makes '.*experts.* of \d stored tensors"):
        open_checkpoint(tmp_path).check()


def test_a_missing_matrix_of_a_converted_network_is_named(tmp_path):
    saved("ViTForImageClassification", IMAGE, tmp_path)
    pico.rewrite(tmp_path, lambda stored: stored.pop("vit.encoder.layer.1.attention.attention.key.weight"))
    with pytest.raises(CheckpointError, match=r"'vit\.layers\.1\.attention\.k_proj\.weight' .* is missing"):
        open_checkpoint(tmp_path).check()


def test_what_a_class_draws_at_random_is_not_taken_as_computed(tmp_path):
    """Sinusoids are the same each time; a table of words, which no class says may be missing, is not."""
    saved("MarianMTModel", PICOS["MarianMTModel"], tmp_path)
    assert "model.encoder.embed_positions.weight" not in load_file(tmp_path / "model.safetensors")
    pico.rewrite(tmp_path, lambda stored: stored.pop("model.shared.weight"))
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(tmp_path).check()


def test_an_index_of_shards_is_converted_across_them(tmp_path):
    wanted = saved("OlmoeForCausalLM", MIXTURES["OlmoeForCausalLM"], tmp_path).state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(stored)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: stored[name] for name in inside}, tmp_path / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    fused = wanted["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(checkpoint.read("model.layers.1.mlp.experts.2.gate_up_proj.weight"), fused[2])


def test_experts_in_eight_bits_are_read_with_their_scales(tmp_path):
    """One scale for each row, as FP8 checkpoints have them; the values are those that 8 bits hold exactly."""
    saved("MixtralForCausalLM", MIXTURES["MixtralForCausalLM"], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stem, scale = "model.layers.0.block_sparse_moe.experts.1", torch.full((40, 1), 0.25)
    wanted = {}
    for part in ("w1", "w3"):
        codes = torch.randint(-6, 7, (40, 24)).to(torch.float8_e4m3fn)
        stored[f"{stem}.{part}.weight"], stored[f"{stem}.{part}.weight_scale_inv"] = codes, scale.clone()
        wanted[part] = codes.float() * scale
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    matrix = checkpoint.read("model.layers.0.mlp.experts.1.gate_up_proj.weight")
    assert torch.equal(matrix, torch.cat([wanted["w1"], wanted["w3"]]))
    assert checkpoint.skipped == []
