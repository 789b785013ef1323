"""A decoder built from its config computes what transformers computes with the decoded weights, cache included."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor.core.encoding import Binary, Layout
from compressor.core.errors import ExportError
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.export.decoder import export_decoder
from compressor.export.decoder_config import DecoderConfig, decoder_refusal
from tests.export.networks import opened, rounded, vectors

PICO = {
    "vocab_size": 131, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
NETWORKS = {
    "llama": {"model_type": "llama"},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "llama_llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral_window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_windows": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "granite": {
        "model_type": "granite", "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
    },
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 3},
    "gemma": {"model_type": "gemma"},
    "gemma2": {
        "model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text", "sliding_window": 5, "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "head_dim": 32, "hidden_size": 96},
    "phi3_window": {"model_type": "phi3", "pad_token_id": 0, "sliding_window": 5},
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0, "no_rope_layers": [0, 1]},
    "smollm3_windows": {
        "model_type": "smollm3", "pad_token_id": 0, "no_rope_layers": [1, 0], "use_sliding_window": True,
        "sliding_window": 5,
    },
}  # fmt: skip


ENCODERS = {
    "float32": lambda weight: EncodedTensor.dense(weight).encoding,
    "float16": lambda weight: EncodedTensor.dense(weight, torch.float16).encoding,
    "affine2": lambda weight: rounded(weight, 2, 32),
    "affine2half": lambda weight: rounded(weight, 2, 64, half=True),
    "affine3": lambda weight: rounded(weight, 3, 32),
    "affine4": lambda weight: rounded(weight, 4, 32),
    "affine4row": lambda weight: rounded(weight, 4, weight.shape[1]),
    "affine8": lambda weight: rounded(weight, 8, 64),
    "vectors": lambda weight: vectors(weight, books=2),
    "vectors9": lambda weight: vectors(weight, 9, books=2, ordered=False),
    "binary": lambda weight: Binary.of(weight > 0, weight.abs().mean(1, keepdim=True)),
}


def pico(settings: dict) -> transformers.PreTrainedModel:
    config = {**PICO, **settings}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = 0.2 * torch.randn_like(parameter) + (0.0 if name.endswith("bias") else 1.0)
    return model


def exported(model: transformers.PreTrainedModel, encoder: str, directory: Path, mode: str, exact: bool = True):
    """The session of the model with encoded matrices; the model itself then holds the decoded ones."""
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = parameter.data
        if weight.dim() == 2:
            tensors[name] = EncodedTensor(ENCODERS[encoder](weight), Layout(tuple(weight.shape)))
            parameter.data = tensors[name].decode()
        else:
            tensors[name] = EncodedTensor.dense(weight)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    write_tensors(directory / "model.safetensors", tensors, tied)
    lazy = EncodedTensors([directory / "model.safetensors"])
    path = export_decoder(model.config.to_dict(), lazy, directory, mode, exact)
    return opened(path)


def run(session, ids: np.ndarray, past: dict[str, np.ndarray] | None = None, mask: np.ndarray | None = None):
    """(logits, the cache as inputs of the next call)."""
    feeds = {"input_ids": ids} | (past or {})
    for entry in session.get_inputs()[2:]:
        feeds.setdefault(entry.name, np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), np.float32))
    seen = feeds["past_key_values.0.key"].shape[2]
    feeds["attention_mask"] = np.ones((len(ids), seen + ids.shape[1]), np.int64) if mask is None else mask
    logits, *present = session.run(None, feeds)
    names = [entry.name.replace("present", "past_key_values") for entry in session.get_outputs()[1:]]
    return logits, dict(zip(names, present, strict=True))


def same_logits(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    found, expected = (logits - logits.mean(-1, keepdims=True) for logits in (found, expected))
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


IDS = np.random.default_rng(0).integers(0, 131, (2, 11))


def holds(model: transformers.PreTrainedModel, network: onnxruntime.InferenceSession) -> None:
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)).logits.numpy()
    whole, _ = run(network, IDS)
    same_logits(whole, expected, 1e-4)
    logits, past = run(network, IDS[:, :4])
    steps = [logits]
    for i in range(4, IDS.shape[1]):
        logits, past = run(network, IDS[:, i : i + 1], past)
        steps.append(logits)
    same_logits(np.concatenate(steps, 1), expected, 1e-4)


@pytest.mark.parametrize("mode", ["default", "compat", "standard"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoding_computes_with_the_decoded_weights(tmp_path, encoder, mode):
    if (encoder, mode) == ("affine8", "compat"):
        pytest.skip("8 bits are refused there")
    model = pico(NETWORKS["llama"])
    network = exported(model, encoder, tmp_path, mode)
    holds(model, network)


@pytest.mark.parametrize("mode", ["default", "standard"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_prefills_and_decodes_like_transformers(tmp_path, name, mode):
    model = pico(NETWORKS[name])
    network = exported(model, "affine4", tmp_path, mode)
    holds(model, network)


@pytest.mark.parametrize("mode", ["default", "compat", "standard"])
def test_a_shorter_sequence_of_a_batch_may_be_padded_on_the_right(tmp_path, mode):
    model = pico(NETWORKS["llama"])
    network = exported(model, "affine4", tmp_path, mode)
    alone, _ = run(network, IDS[1:, :6])
    mask = np.ones_like(IDS)
    mask[1, 6:] = 0
    together, _ = run(network, IDS, mask=mask)
    same_logits(together[1:, :6], alone, 1e-4)


def test_int8_activations_stay_near(tmp_path):
    model = pico(NETWORKS["llama"])
    network = exported(model, "affine4", tmp_path, "default", exact=False)
    with torch.no_grad():
        same_logits(run(network, IDS)[0], model(torch.from_numpy(IDS)).logits.numpy(), 0.1)


def test_standard_mode_uses_no_contributed_operator(tmp_path):
    import onnx

    exported(pico(NETWORKS["llama"]), "affine2", tmp_path, "standard")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert [entry.domain for entry in graph.opset_import] == [""]
    onnx.checker.check_model(tmp_path / "model.onnx")


def test_unknown_decoders_are_refused_by_name(tmp_path):
    assert decoder_refusal(PICO | {"model_type": "llama"}) is None
    yarn = PICO | {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert decoder_refusal(yarn) == "rotary embedding 'yarn' is not supported; known: default, linear, llama3"
    with pytest.raises(ExportError, match="no decoder graph for model_type 'gptj'; known: llama, mistral"):
        export_decoder(PICO | {"model_type": "gptj"}, None, tmp_path)


@pytest.mark.slow
def test_smollm2_in_four_bits_continues_a_sentence(tmp_path):
    source = Path(os.environ.get("COMPRESSOR_CACHE", Path(__file__).parents[2] / ".cache")) / "smollm2"
    if not (source / "config.json").exists():
        pytest.skip("SmolLM2-135M is not in the cache: scripts/fetch_material")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    network = exported(model, "affine4", tmp_path, "default")
    ids = tokenizer("The capital of France is", return_tensors="np")["input_ids"]
    logits, _ = run(network, ids)
    with torch.no_grad():
        same_logits(logits, model(torch.from_numpy(ids)).logits.numpy(), 1e-3)
    assert json.loads((source / "config.json").read_text())["vocab_size"] == logits.shape[-1]


OLD_WINDOWS = (
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    {"model_type": "mistral"},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "llama", "sliding_window": 5},
    {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [0, 1]},
    {"model_type": "phi3", "sliding_window": 5, "pad_token_id": 0},
    {"model_type": "phi3", "pad_token_id": 0},
)


@pytest.mark.parametrize("settings", OLD_WINDOWS)
def test_windows_of_configs_that_name_no_kinds_of_layers_are_those_of_transformers(settings):
    config = PICO | settings
    known = transformers.AutoConfig.for_model(**config)
    window = getattr(known, "sliding_window", None) if settings["model_type"] != "llama" else None
    kinds = getattr(known, "layer_types", None) or [window and "sliding_attention"] * 2
    expected = tuple(window if kind == "sliding_attention" else -1 for kind in kinds)
    assert DecoderConfig.of(config).windows == expected


@pytest.mark.parametrize("size", [8, 20, 24, 100])
def test_heads_that_onnxruntime_does_not_rotate_are_left_to_the_traced_graph(size):
    reason = decoder_refusal(PICO | {"model_type": "llama", "head_dim": size})
    assert reason == f"heads of {size} are not supported in GroupQueryAttention; known: multiples of 16"
