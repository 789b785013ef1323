"""The original, streamed block by block, computes what the whole model computes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers

from compressor.checkpoints import open_checkpoint
from compressor.evaluate.language import evaluate_language
from compressor.evaluate.reference import original_logits, original_outputs
from compressor.graph.blocks import block_names
from scripts import material

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_positions=32),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=6, sliding_window=4),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=6),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_logits_are_the_whole_models(tmp_path, name):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(0, 61, (3, 9))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = np.concatenate(list(original_logits(open_checkpoint(tmp_path), ids)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(**SIZES),
        transformers.AlbertConfig(**SIZES, embedding_size=8),  # its layers share weights: one block
    ],
    ids=["bert", "albert"],
)
def test_encoders_stream_with_their_masks(tmp_path, config):
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    ids, mask = np.random.default_rng(2).integers(0, 61, (2, 7)), np.ones((2, 7), np.int64)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    batch = {"input_ids": ids, "attention_mask": mask}
    first, second = original_outputs(open_checkpoint(tmp_path), [batch, batch])
    assert list(first) == ["last_hidden_state", "pooler_output"]
    np.testing.assert_allclose(first["last_hidden_state"], expected, atol=1e-5)
    np.testing.assert_array_equal(first["last_hidden_state"], second["last_hidden_state"])


def test_half_precision_weights_are_computed_with_in_float32(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).bfloat16().eval()
    model.save_pretrained(tmp_path)
    ids = np.arange(8)[None]
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(ids)).logits.numpy()
    (found,) = original_logits(open_checkpoint(tmp_path), ids)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_only_one_block_has_weights_at_a_time(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    materialise, seen, blocks = checkpoint.materialise, [], []

    def watched(module, names=None, device="cpu"):
        materialise(module, names, device)
        blocks[:] = block_names(module)
        seen.append([name for name in blocks if any(not p.is_meta for p in module.get_submodule(name).parameters())])

    checkpoint.materialise = watched
    list(original_logits(checkpoint, np.arange(6)[None]))
    assert [loaded for loaded, _ in itertools.groupby(seen)] == [[], *([name] for name in blocks), []]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "published"), [("moby", 34.40), ("sotu", 23.50)])
def test_the_published_perplexities_of_smollm2_come_out(text, published):
    try:
        checkpoint = open_checkpoint(material.model_dir("smollm2"))
        windows = material.evaluation_windows(text)
    except material.MaterialAbsent as absent:
        pytest.skip(str(absent))
    reference = original_logits(checkpoint, windows)

    class Original:
        def logits(self, ids):
            return next(reference)

    assert evaluate_language(Original(), None, windows).perplexity == pytest.approx(published, abs=0.01)
