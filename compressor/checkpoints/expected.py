"""What tensors the module of a transformers config has, for a few common kinds of networks, without building it.

It is a quick yes: where a checkpoint has exactly these tensors under a config of plain settings, the module takes them.
Everything else is for the module itself to tell, which takes seconds. tests/checkpoints holds this table against the
modules of transformers. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from compressor.checkpoints.ties import architecture_of

Shapes = dict[str, tuple[int, ...]]

COMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|cos_cached|sin_cached|masked_bias|num_batches_tracked"
    r"|(attn|attention)\.bias)$"
)
"""Buffers that older files hold and that modules compute themselves."""

_COMMON = (
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range",
    "model_type", "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size",
)  # fmt: skip
_LLAMA = (
    *_COMMON, "attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "is_llama_config", "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pretraining_tp", "rms_norm_eps",
    "rope_interleaved", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "transformers.js_config",
    "unk_token_id", "use_sliding_window",
)  # fmt: skip
_GPT2 = (
    *_COMMON, "activation_function", "attn_pdrop", "embd_pdrop", "layer_norm_epsilon", "n_ctx", "n_embd", "n_head",
    "n_inner", "n_layer", "n_positions", "reorder_and_upcast_attn", "resid_pdrop", "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "add_cross_attention",
)  # fmt: skip
_BERT = (
    *_COMMON, "add_cross_attention", "attention_probs_dropout_prob", "classifier_dropout", "gradient_checkpointing",
    "hidden_act", "hidden_dropout_prob", "hidden_size", "intermediate_size", "is_decoder", "layer_norm_eps",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "position_embedding_type",
    "type_vocab_size", "_name_or_path",
)  # fmt: skip
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "relu")
_DTYPES = (None, "float32", "float16", "bfloat16")
_LAYERS = ("full_attention", "sliding_attention")
_NUMBERS = re.compile(r"(_eps|_epsilon|_theta|_range|_dropout|_prob|_pdrop)$")
_SWITCHES = re.compile(r"^(use_|tie_|attention_bias|mlp_bias|scale_|reorder_|gradient_)")


def expected_tensors(config: dict[str, Any] | None) -> Shapes | None:
    """Names and shapes of the parameters, tied ones by their first name; None where the module has to be asked."""
    config = config or {}
    known = _KINDS.get((str(config.get("model_type")), architecture_of(config)))
    if known is None or not set(config) <= set(known[0]):
        return None
    try:
        found = known[1](config) if _is_plain(config) else {}
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    sizes = [size for shape in found.values() for size in shape]
    return found if sizes and all(isinstance(size, int) and size > 0 for size in sizes) else None


def _is_plain(config: dict[str, Any]) -> bool:
    """Whether every setting is one that no class of these kinds refuses."""
    kinds = config.get("layer_types")
    padding = config.get("pad_token_id")
    return (
        all(_is_usual(key, value) for key, value in config.items())
        and config.get("hidden_act", config.get("activation_function", "silu")) in _ACTIVATIONS
        and config.get("dtype", config.get("torch_dtype")) in _DTYPES
        and config.get("position_embedding_type", "absolute") == "absolute"
        and (padding is None or padding < config["vocab_size"])
        and (kinds is None or (len(kinds) == config["num_hidden_layers"] and set(kinds) <= set(_LAYERS)))
        and not config.get("is_decoder")
        and not config.get("add_cross_attention")
    )


def _is_usual(key: str, value: Any) -> bool:
    """Whether a setting has the type that it always has, and a size that memory has."""
    if value is None or isinstance(value, str):
        return value is None or not (_NUMBERS.search(key) or _SWITCHES.match(key))
    if _SWITCHES.match(key) or isinstance(value, bool):
        return isinstance(value, bool)
    if _NUMBERS.search(key):
        rate = key.endswith(("_dropout", "_prob", "_pdrop"))
        return isinstance(value, (int, float)) and 0 <= value <= (1 if rate else 1e9)
    return isinstance(value, (list, dict)) or (isinstance(value, int) and 0 <= value < 2**24)


def _divided(width: int, heads: int) -> int:
    """The width of a head.

    Raises:
        KeyError: Heads do not divide it, which classes refuse.
    """
    if width % heads:
        raise KeyError("heads")
    return width // heads


def _llama(config: dict[str, Any]) -> Shapes:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys, kind = config.get("num_key_value_heads") or heads, config["model_type"]
    size = config.get("head_dim") or _divided(width, heads)
    _divided(width, heads)
    _divided(heads, keys)
    _refuse_scaled(config)
    biased = {"llama": ("q", "k", "v", "o") if config.get("attention_bias") else (), "qwen2": ("q", "k", "v"),
              "qwen3": ("q", "k", "v", "o") if config.get("attention_bias") else ()}.get(kind, ())  # fmt: skip
    found: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for number in range(config["num_hidden_layers"]):
        stem = f"model.layers.{number}"
        outputs = {"q": heads * size, "k": keys * size, "v": keys * size, "o": width}
        for part, n in outputs.items():
            found[f"{stem}.self_attn.{part}_proj.weight"] = (n, heads * size if part == "o" else width)
            if part in biased:
                found[f"{stem}.self_attn.{part}_proj.bias"] = (n,)
        for part, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            found[f"{stem}.mlp.{part}_proj.weight"] = shape
            if kind == "llama" and config.get("mlp_bias"):
                found[f"{stem}.mlp.{part}_proj.bias"] = shape[:1]
        norms = ("self_attn.q_norm", "self_attn.k_norm") if kind == "qwen3" else ()
        found |= {f"{stem}.{norm}.weight": (size,) for norm in norms}
        found |= {f"{stem}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return found | (
        {} if config.get("tie_word_embeddings", False) else {"lm_head.weight": (config["vocab_size"], width)}
    )


def _refuse_scaled(config: dict[str, Any]) -> None:
    """Raises KeyError where rotary embeddings are anything but plain: their settings have rules of their own."""
    rotary = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if not set(rotary) <= {"rope_type", "type", "rope_theta"} or rotary.get("rope_type", "default") != "default":
        raise KeyError("rope_parameters")


def _gpt2(config: dict[str, Any]) -> Shapes:
    width = config["n_embd"]
    _divided(width, config["n_head"])
    inner = config.get("n_inner") or 4 * width
    found: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["n_positions"], width),
    }
    for number in range(config["n_layer"]):
        stem = f"transformer.h.{number}"
        products = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
                    "mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}  # fmt: skip
        for part, (n_in, n_out) in products.items():
            found |= {f"{stem}.{part}.weight": (n_in, n_out), f"{stem}.{part}.bias": (n_out,)}
        found |= _norm(f"{stem}.ln_1", width) | _norm(f"{stem}.ln_2", width)
    found |= _norm("transformer.ln_f", width)
    return found | (
        {} if config.get("tie_word_embeddings", True) else {"lm_head.weight": (config["vocab_size"], width)}
    )


def _bert(config: dict[str, Any]) -> Shapes:
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    _divided(width, config["num_attention_heads"])
    masked = architecture_of(config) == "BertForMaskedLM"
    if masked and not config.get("tie_word_embeddings", True):
        raise KeyError("tie_word_embeddings")
    prefix = "bert." if masked else ""
    tables = {"word": words, "position": config["max_position_embeddings"], "token_type": config["type_vocab_size"]}
    found: Shapes = {f"{prefix}embeddings.{kind}_embeddings.weight": (n, width) for kind, n in tables.items()}
    found |= _norm(f"{prefix}embeddings.LayerNorm", width)
    for number in range(config["num_hidden_layers"]):
        stem = f"{prefix}encoder.layer.{number}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            found |= _linear(f"{stem}.{part}", width, width)
        found |= _linear(f"{stem}.intermediate.dense", inner, width) | _linear(f"{stem}.output.dense", width, inner)
        found |= _norm(f"{stem}.attention.output.LayerNorm", width) | _norm(f"{stem}.output.LayerNorm", width)
    if not masked:
        return found | _linear("pooler.dense", width, width)
    head = "cls.predictions"
    found |= _linear(f"{head}.transform.dense", width, width) | _norm(f"{head}.transform.LayerNorm", width)
    return found | {f"{head}.bias": (words,)}


def _linear(stem: str, n_out: int, n_in: int) -> Shapes:
    return {f"{stem}.weight": (n_out, n_in), f"{stem}.bias": (n_out,)}


def _norm(stem: str, width: int) -> Shapes:
    return {f"{stem}.weight": (width,), f"{stem}.bias": (width,)}


_KINDS: dict[tuple[str, str], tuple[tuple[str, ...], Callable[[dict[str, Any]], Shapes]]] = {
    ("llama", "LlamaForCausalLM"): (_LLAMA, _llama),
    ("mistral", "MistralForCausalLM"): (_LLAMA, _llama),
    ("qwen2", "Qwen2ForCausalLM"): (_LLAMA, _llama),
    ("qwen3", "Qwen3ForCausalLM"): (_LLAMA, _llama),
    ("gpt2", "GPT2LMHeadModel"): (_GPT2, _gpt2),
    ("bert", "BertForMaskedLM"): (_BERT, _bert),
    ("bert", "BertModel"): (_BERT, _bert),
}
"""(model_type, class) -> the settings that are known, and the tensors by them."""
