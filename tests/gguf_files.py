"""GGUF files as llama.cpp's converter writes them, from networks of transformers; names are by the gguf package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers


def write_gguf(module: transformers.PreTrainedModel, architecture: gguf.MODEL_ARCH, path: Path, tokenizer: Path,
               metadata: dict[str, Any] | None = None) -> None:  # fmt: skip
    """The network's weights and settings, and the tokenizer of a tokenizer.json.

    metadata    of the architecture, besides what all have: integers and floats by key
    """
    name, config = gguf.MODEL_ARCH_NAMES[architecture], module.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, name)
    for add, value in (
        (writer.add_block_count, config.num_hidden_layers), (writer.add_embedding_length, config.hidden_size),
        (writer.add_context_length, 128), (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads), (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps), (writer.add_key_length, head_dim),
        (writer.add_vocab_size, config.vocab_size), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1),
    ):  # fmt: skip
        add(value)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(f"{name}.{key}", value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{name}.{key}", value)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in module.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if name.startswith("gemma") and key.endswith("norm.weight"):
            values = values + np.float32(1)
        if name in ("llama", "granite", "smollm3") and key.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), np.ascontiguousarray(values))
    model = json.loads(tokenizer.read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].__getitem__))
    writer.add_token_types([1] * len(model["vocab"]))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
