"""What the graph of a Llama-like decoder needs to know, read from a Hugging Face config; others are refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")
HEAD_STEP = 16
"""What onnxruntime's GroupQueryAttention wants the size of a head to be a multiple of, to rotate it."""
FIRST_WINDOW, USUAL_WINDOW, QWEN3_HEAD = 28, 4096, 128
"""transformers' own settings where a config has none: a qwen's first layer with a window, the window, qwen3's heads."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches; `windows[i]` is the attention window of layer i, or −1."""

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
    tied: bool
    head_norms: bool

    @classmethod
    def of(cls, config: dict[str, Any], context: int | None = None) -> DecoderConfig:
        """Reads a config for which `decoder_refusal` is None; `context` shortens the longest sequence."""
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        head_dim = _head_dim(config)
        longest = config.get("max_position_embeddings") or 2048
        return cls(
            layers=layers, hidden=config["hidden_size"], heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads, head_dim=head_dim, vocabulary=config["vocab_size"],
            epsilon=config.get("rms_norm_eps", 1e-6), context=min(longest, context or longest),
            inverse_frequencies=tuple(inverse_frequencies(_rope(config), head_dim).tolist()),
            windows=_windows(config), tied=bool(config.get("tie_word_embeddings", False)),
            head_norms=config["model_type"] == "qwen3",
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
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
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


def _windows(config: dict[str, Any]) -> tuple[int, ...]:
    """The window of each layer, as transformers reads configs of every age."""
    layers, kind, kinds = config["num_hidden_layers"], config["model_type"], config.get("layer_types")
    if kind == "mistral":
        return (config.get("sliding_window", USUAL_WINDOW) or -1,) * layers
    if kind == "llama" or not config.get("use_sliding_window"):
        return (-1,) * layers
    window = config.get("sliding_window", USUAL_WINDOW) or -1
    if not kinds:
        first = config.get("max_window_layers", FIRST_WINDOW)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return tuple(window if kind == "sliding_attention" else -1 for kind in kinds)
