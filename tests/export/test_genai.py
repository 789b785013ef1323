"""genai_config.json says what onnxruntime-genai must know, and no more than the configs hold."""

from __future__ import annotations

import json

from compressor.export.decoder_config import DecoderConfig
from compressor.export.genai import write_genai_config
from tests.export.test_decoder import PICO


def test_the_config_names_sizes_tokens_and_inputs(tmp_path):
    config = PICO | {"model_type": "qwen2", "bos_token_id": 1, "eos_token_id": 2}
    generation = {"eos_token_id": [5, 6], "top_k": 20, "temperature": None}
    written = json.loads(
        write_genai_config(config, DecoderConfig.of(config), tmp_path, generation).read_text(encoding="utf-8")
    )
    model, decoder = written["model"], written["model"]["decoder"]
    assert (model["type"], model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (
        "llama",
        1,
        [5, 6],
        5,
    )
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (32, 1, 2)
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert (written["search"]["top_k"], written["search"]["temperature"]) == (20, 1.0)
    assert written["search"]["past_present_share_buffer"] is False
