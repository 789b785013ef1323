"""genai_config.json, with which onnxruntime-genai runs an exported decoder as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.export.decoder_config import DecoderSizes

FILE_NAME = "genai_config.json"
_SEARCH = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def write_genai_config(
    config: dict[str, Any], sizes: DecoderSizes, out_dir: Path,
    generation_config: dict[str, Any] | None = None, model_file: str = "model.onnx",
) -> Path:  # fmt: skip
    """Writes it beside the model; the tokenizer's files must lie there too. `type` is always "llama": its names fit."""
    generation = generation_config or {}
    known = {**config, **{key: value for key, value in generation.items() if value is not None}}
    ends, pad = known.get("eos_token_id") or 0, known.get("pad_token_id")
    first_end = ends[0] if isinstance(ends, list) else ends
    model = {
        "type": "llama",
        "bos_token_id": known.get("bos_token_id") or 0,
        "eos_token_id": ends,
        "pad_token_id": first_end if pad is None else pad,
        "vocab_size": sizes.vocabulary,
        "context_length": sizes.context,
        "decoder": _decoder(sizes, model_file),
    }
    search = {key: known.get(key, value) for key, value in _SEARCH.items()}
    search |= {"max_length": sizes.context, "min_length": 0, "num_beams": 1, "past_present_share_buffer": False}
    path = out_dir / FILE_NAME
    path.write_text(json.dumps({"model": model, "search": search}, indent=2) + "\n", encoding="utf-8")
    return path


def _decoder(sizes: DecoderSizes, model_file: str) -> dict[str, Any]:
    return {
        "filename": model_file,
        "session_options": {"provider_options": []},
        "head_size": sizes.head_dim,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
