"""What the graph of a Llama-like decoder needs to know, read from a Hugging Face config; others are refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "smollm3")
TIED = ("smollm3",)
"""Whose head is the embedding's table where the config does not say."""
EPSILONS = {"phi3": 1e-5}
"""Of norms where the config has none; 1e-6 otherwise."""
THETAS = {"smollm3": 2_000_000.0}
"""Bases of rotation where the config has none; 10,000 otherwise."""
ROPE_TYPES = ("default", "linear", "llama3")
HEAD_STEP = 16
"""What onnxruntime's GroupQueryAttention wants the size of a head to be a multiple of, to rotate it."""
FIRST_WINDOW, USUAL_WINDOW, QWEN3_HEAD, NOPE_INTERVAL = 28, 4096, 128, 4
"""transformers' own settings where a config has none: qwen's first layer with a window, the window, qwen3's heads, and
every how many layers of smollm3 do not rotate."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches.

    windows      of attention, of each layer; −1 for none
    rotated      whether a layer rotates by positions
    head_norms   queries and keys are normed by head
    fused        queries, keys and values are one tensor, and so are gate and up
    attention_scale, embedding_scale, residual_scale, logit_scale
                 factors of scores, of embeddings, of what a layer adds, of logits
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    context: int
    inverse_frequencies: tuple[float, ...]
    windows: tuple[int, ...]
    rotated: tuple[bool, ...]
    tied: bool
    head_norms: bool
    fused: bool
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float

    @classmethod
    def of(cls, config: dict[str, Any], context: int | None = None) -> DecoderConfig:
        """Reads a config for which `decoder_refusal` is None; `context` shortens the longest sequence."""
        heads, layers, kind = config["num_attention_heads"], config["num_hidden_layers"], config["model_type"]
        granite = kind == "granite"
        head_dim = _head_dim(config)
        longest = config.get("max_position_embeddings") or 2048
        return cls(
            layers=layers, hidden=config["hidden_size"], heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads, head_dim=head_dim, vocabulary=config["vocab_size"],
            epsilon=config.get("rms_norm_eps", EPSILONS.get(kind, 1e-6)), context=min(longest, context or longest),
            inverse_frequencies=tuple(inverse_frequencies(_rope(config), head_dim).tolist()),
            windows=_windows(config), rotated=_rotated(config),
            tied=bool(config.get("tie_word_embeddings", kind in TIED)), head_norms=kind == "qwen3", fused=kind == "phi3",
            attention_scale=config.get("attention_multiplier", 1.0) if granite else head_dim**-0.5,
            embedding_scale=config.get("embedding_multiplier", 1.0) if granite else 1.0,
            residual_scale=config.get("residual_multiplier", 1.0) if granite else 1.0,
            logit_scale=1 / config.get("logits_scaling", 1.0) if granite else 1.0,
        )  # fmt: skip


def decoder_refusal(config: dict[str, Any]) -> str | None:
    """Why the decoder cannot be built from its config alone, or None."""
    kind, rope = config.get("model_type"), _rope(config)
    if kind not in MODEL_TYPES:
        return f"no decoder graph for model_type '{kind}'; known: {', '.join(MODEL_TYPES)}"
    if rope["rope_type"] not in ROPE_TYPES:
        return f"rotary embedding '{rope['rope_type']}' is not supported; known: {', '.join(ROPE_TYPES)}"
    if config.get("hidden_act", "silu") != "silu":
        return f"activation '{config['hidden_act']}' is not supported in a decoder; known: silu"
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        return "rotary embeddings over a part of the head are not supported"
    if _head_dim(config) % HEAD_STEP:
        return f"heads of {_head_dim(config)} are not supported in GroupQueryAttention; known: multiples of {HEAD_STEP}"
    return None


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
    if kind in ("llama", "granite") or not config.get("use_sliding_window"):
        return (-1,) * layers
    window = config.get("sliding_window", None if kind == "smollm3" else USUAL_WINDOW) or -1
    if not kinds:
        first, rotated = config.get("max_window_layers", FIRST_WINDOW), _rotated(config)
        local = [not rotated[i] if kind == "smollm3" else i >= first for i in range(layers)]
        kinds = ["sliding_attention" if each else "full_attention" for each in local]
    return tuple(window if kind == "sliding_attention" else -1 for kind in kinds)
