"""What the graph of a Llama-like decoder needs to know, read from a Hugging Face config; others are refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "phi3",
    "smollm3",
    "olmo2",
    "gemma",
    "gemma2",
    "gemma3_text",
)
GEMMAS = ("gemma", "gemma2", "gemma3_text")
TIED = ("smollm3",)
"""Whose head is the embedding's table where the config does not say."""
LLAMA_NORMS = ("input_layernorm", None, "post_attention_layernorm", None)
_SANDWICH = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
NORMS = {
    "gemma2": _SANDWICH, "gemma3_text": _SANDWICH,
    "olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}  # fmt: skip
EPSILONS = {"phi3": 1e-5, "olmo2": 1e-5}
"""Of norms where the config has none; 1e-6 otherwise."""
THETAS = {"smollm3": 2_000_000.0}
"""Bases of rotation where the config has none; 10,000 otherwise."""
ROPE_TYPES = ("default", "linear", "llama3")
USUAL_LENGTH = 2048
"""The longest sequence where a config has none."""
HEAD_STEP = 16
"""What onnxruntime's GroupQueryAttention wants the size of a head to be a multiple of, to rotate it."""
FIRST_WINDOW, USUAL_WINDOW, QWEN3_HEAD, NOPE_INTERVAL = 28, 4096, 128, 4
"""transformers' own settings where a config has none: qwen's first layer with a window, the window, qwen3's heads, and
every how many layers of smollm3 do not rotate."""


@dataclass(frozen=True)
class DecoderSizes:
    """What hosts must know of a decoder; `context` is the longest sequence."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class DecoderConfig(DecoderSizes):
    """Sizes and switches.

    inverse_frequencies, windows
                  of each layer; a window of −1 is none
    rotated       whether a layer rotates by positions
    norms         of a layer: before attention, after it, before the two products, after them; None for none
    head_norms, width_norms
                  queries and keys are normed by head, or all heads together
    around_one    weights of norms are stored less one
    fused         queries, keys and values are one tensor, and so are gate and up
    activation    "silu", or "gelu" by tanh
    attention_scale, embedding_scale, residual_scale, logit_scale
                  factors of scores, of embeddings, of what a layer adds, of logits
    attention_cap, logit_cap
                  what tanh holds scores and logits below; None for nothing
    """

    epsilon: float
    inverse_frequencies: tuple[tuple[float, ...], ...]
    windows: tuple[int, ...]
    rotated: tuple[bool, ...]
    tied: bool
    norms: tuple[str | None, str | None, str | None, str | None]
    head_norms: bool
    width_norms: bool
    around_one: bool
    fused: bool
    activation: str
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    attention_cap: float | None
    logit_cap: float | None

    @classmethod
    def of(cls, config: dict[str, Any], context: int | None = None) -> DecoderConfig:
        """Reads a config for which `decoder_refusal` is None; `context` shortens the longest sequence."""
        config = _whole(config)
        heads, layers, kind = config["num_attention_heads"], config["num_hidden_layers"], config["model_type"]
        granite, gemma, head_dim = kind == "granite", kind in GEMMAS, _head_dim(config)
        longest = config.get("max_position_embeddings") or USUAL_LENGTH
        scale = config.get("query_pre_attn_scalar", head_dim) ** -0.5
        tables = {kind: tuple(inverse_frequencies(rope, head_dim).tolist()) for kind, rope in _ropes(config).items()}
        kinds = config.get("layer_types") or [""] * layers
        return cls(
            layers=layers, hidden=config["hidden_size"], heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads, head_dim=head_dim, vocabulary=config["vocab_size"],
            epsilon=config.get("rms_norm_eps", EPSILONS.get(kind, 1e-6)), context=min(longest, context or longest),
            inverse_frequencies=tuple(tables.get(each, tables.get("", ())) for each in kinds),
            windows=_windows(config), rotated=_rotated(config),
            tied=bool(config.get("tie_word_embeddings", kind in TIED)), norms=NORMS.get(kind, LLAMA_NORMS),
            head_norms=kind in ("qwen3", "gemma3_text"), width_norms=kind == "olmo2", around_one=gemma,
            fused=kind == "phi3", activation="gelu" if gemma else "silu",
            attention_scale=config.get("attention_multiplier", 1.0) if granite else scale,
            embedding_scale=config["hidden_size"] ** 0.5 if gemma else config.get("embedding_multiplier", 1.0),
            residual_scale=config.get("residual_multiplier", 1.0),
            logit_scale=1 / config.get("logits_scaling", 1.0),
            attention_cap=config.get("attn_logit_softcapping") if gemma else None,
            logit_cap=config.get("final_logit_softcapping") if gemma else None,
        )  # fmt: skip


def decoder_refusal(config: dict[str, Any]) -> str | None:
    """Why the decoder cannot be built from its config alone, or None."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        return f"no decoder graph for model_type '{kind}'; known: {', '.join(MODEL_TYPES)}"
    config = _whole(config)
    for rope in _ropes(config).values():
        if rope["rope_type"] not in ROPE_TYPES:
            return f"rotary embedding '{rope['rope_type']}' is not supported; known: {', '.join(ROPE_TYPES)}"
        if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
            return "rotary embeddings over a part of the head are not supported"
    wanted = "gelu_pytorch_tanh" if kind in GEMMAS else "silu"
    found = config.get("hidden_activation", config.get("hidden_act", wanted))
    if found != wanted:
        return f"activation '{found}' is not supported in a decoder; known: {wanted}"
    if config.get("use_bidirectional_attention"):
        return "attention in both directions is not supported"
    if _head_dim(config) % HEAD_STEP:
        return f"heads of {_head_dim(config)} are not supported in GroupQueryAttention; known: multiples of {HEAD_STEP}"
    return None


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what transformers fills in, for gemma: its configs leave much out."""
    if config["model_type"] not in GEMMAS:
        return config
    import transformers

    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()


def _ropes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary settings of each kind of layer; of "", where all layers have the same."""
    if config["model_type"] != "gemma3_text":
        return {"": _rope(config)}
    return {kind: _rope(config | {"rope_parameters": rope}) for kind, rope in config["rope_parameters"].items()}


def rotary_tables(config: dict[str, Any]) -> int:
    """Values in the tables of cosines and sines of a decoder that is built from its config; of others 0."""
    if decoder_refusal(config) is not None:
        return 0
    config = _whole(config)
    kinds = {repr(sorted(rope.items())) for rope in _ropes(config).values()}
    return 2 * len(kinds) * (config.get("max_position_embeddings") or USUAL_LENGTH) * (_head_dim(config) // 2)


def _head_dim(config: dict[str, Any]) -> int:
    usual = QWEN3_HEAD if config["model_type"] == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim") or usual


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of both generations of configs: rope_parameters, or rope_theta and rope_scaling."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", THETAS.get(str(config.get("model_type")), 10000.0)))
    found.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return found


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """θ^(−2i/d), i = 0 … d/2−1, scaled as `rope_type` says (linear, llama3): float32 (head_dim / 2,)."""
    import torch

    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope["rope_type"] == "linear":
        return plain / rope["factor"]
    if rope["rope_type"] == "default":
        return plain
    low, high, trained = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / rope["factor"] + blend * plain


def _rotated(config: dict[str, Any]) -> tuple[bool, ...]:
    """Whether each layer rotates: of smollm3, those that `no_rope_layers` has a 1 for."""
    layers = config["num_hidden_layers"]
    if config["model_type"] != "smollm3":
        return (True,) * layers
    known, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", NOPE_INTERVAL)
    return tuple(bool(known[layer]) if known else (layer + 1) % interval != 0 for layer in range(layers))


def _windows(config: dict[str, Any]) -> tuple[int, ...]:
    """The window of each layer, as transformers reads configs of every age."""
    layers, kind, kinds = config["num_hidden_layers"], config["model_type"], config.get("layer_types")
    if kind in ("mistral", "phi3"):
        return (config.get("sliding_window", USUAL_WINDOW if kind == "mistral" else None) or -1,) * layers
    local = kind in ("gemma2", "gemma3_text") or config.get("use_sliding_window")
    if kind in ("llama", "granite", "olmo2", "gemma") or not local:
        return (-1,) * layers
    window = config.get("sliding_window", None if kind == "smollm3" else USUAL_WINDOW) or -1
    if not kinds:
        first, rotated = config.get("max_window_layers", FIRST_WINDOW), _rotated(config)
        some = [not rotated[i] if kind == "smollm3" else i >= first for i in range(layers)]
        kinds = ["sliding_attention" if each else "full_attention" for each in some]
    return tuple(window if kind == "sliding_attention" else -1 for kind in kinds)
