"""Hugging Face directories: names, ties, shards, checks, and what is refused."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.architecture import ENCODER_TYPES, family_of
from compressor.checkpoints.ties import UNTIED_BY_DEFAULT
from compressor.core.errors import CheckpointError
from tests import pico

PICO = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 53,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def pico_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**PICO, tie_word_embeddings=tied)).eval()


@pytest.fixture
def llama(tmp_path):
    pico_llama().save_pretrained(tmp_path)
    return tmp_path


def test_a_loaded_module_computes_what_the_saved_one_does(llama):
    checkpoint = open_checkpoint(llama)
    module = checkpoint.build("cpu")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(module(ids).logits, pico_llama()(ids).logits, rtol=0, atol=0)
    assert (checkpoint.kind, checkpoint.architecture, checkpoint.family) == (
        "huggingface",
        "LlamaForCausalLM",
        "decoder",
    )


def test_a_skeleton_has_no_weights_but_real_buffers_and_loads_by_name(llama):
    checkpoint = open_checkpoint(llama)
    module = checkpoint.build()
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in module.buffers()} == {"cpu"}
    checkpoint.materialise(module, ["model.embed_tokens.weight"])
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.lm_head.weight.device.type == "cpu"
    assert module.model.norm.weight.device.type == "meta"


def test_buffers_on_meta_become_real_again(llama):
    checkpoint = open_checkpoint(llama)
    module = checkpoint.build()
    wanted = module.model.rotary_emb.inv_freq.clone()
    checkpoint.materialise_buffers(module.to("meta"))
    torch.testing.assert_close(module.model.rotary_emb.inv_freq, wanted, rtol=0, atol=0)


def test_tied_tables_are_listed_once(llama):
    checkpoint = open_checkpoint(llama)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in checkpoint.tensors
    torch.testing.assert_close(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight"))


def test_equal_tables_that_are_not_tied_are_kept_apart(tmp_path):
    model = pico_llama(tied=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    module = checkpoint.build("cpu")
    assert checkpoint.tied == {}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(checkpoint.tensors)
    assert module.lm_head.weight is not module.model.embed_tokens.weight


def test_tables_that_the_config_ties_but_that_differ_are_untied(llama):
    pico.rewrite(llama, lambda tensors: tensors.update({"lm_head.weight": torch.ones(53, 24)}))
    checkpoint = open_checkpoint(llama)
    module = checkpoint.build("cpu")
    assert checkpoint.tied == {}
    assert checkpoint.config["tie_word_embeddings"] is False
    assert module.lm_head.weight.eq(1).all()
    assert not module.model.embed_tokens.weight.eq(1).all()


def test_a_tied_table_may_be_stored_under_its_alias(llama):
    pico.rewrite(llama, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    module = open_checkpoint(llama).build("cpu")
    torch.testing.assert_close(module.model.embed_tokens.weight, pico_llama().lm_head.weight, rtol=0, atol=0)


@pytest.mark.parametrize("keep", ["safetensors", "bin"])
def test_shards_are_one_checkpoint(tmp_path, keep):
    pico_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    if keep == "bin":
        to_bin_shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.source.files) > 1
    for name, parameter in pico_llama().named_parameters():
        torch.testing.assert_close(checkpoint.read(name), parameter.data, rtol=0, atol=0)


def to_bin_shards(directory) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for path in sorted(directory.glob("model-*.safetensors")):
        torch.save(load_file(path), directory / f"pytorch_{path.stem}.bin")
        path.unlink()
    index["weight_map"] = {k: f"pytorch_{v.removesuffix('.safetensors')}.bin" for k, v in index["weight_map"].items()}
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path):
    pico_llama().save_pretrained(tmp_path, max_shard_size="10KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ shards are missing: {lost.name}"):
        open_checkpoint(tmp_path)


def test_listing_and_tokenizer_need_no_torch(llama, tmp_path):
    code = (
        "import sys; from compressor.checkpoints import open_checkpoint; "
        f"c = open_checkpoint({str(llama)!r}); c.describe(); c.digest(); "
        "print(len(c.tensors), sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "20 []\n"


def test_a_base_model_prefix_may_be_absent(tmp_path):
    settings = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=16)
    model = GPT2LMHeadModel(settings).eval()
    model.save_pretrained(tmp_path)
    strip = [name for name in model.state_dict() if name.startswith("transformer.")]

    def remove_prefix(tensors):
        for name in strip:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors["stranger"] = torch.ones(3)

    pico.rewrite(tmp_path, remove_prefix)
    checkpoint = open_checkpoint(tmp_path)
    assert "transformer.wte.weight" in checkpoint.tensors
    ids = torch.arange(9)[None]
    torch.testing.assert_close(checkpoint.build("cpu")(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert checkpoint.skipped == ["stranger"]
    assert set(checkpoint.tensors) == {name for name, _ in model.named_parameters()}


def test_an_encoder_ties_its_table_and_its_bias(tmp_path):
    settings = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=31
    )
    BertForMaskedLM(settings).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert checkpoint.family == "encoder"
    assert checkpoint.tied == {
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    }


def poison(tensors) -> None:
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.norm.weight"][5] = float("inf")


def test_nan_is_refused_with_file_tensor_and_count(llama):
    pico.rewrite(llama, poison)
    checkpoint = open_checkpoint(llama)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.norm.weight' holds 2 NaN or inf"):
        checkpoint.read("model.norm.weight")


def test_a_missing_tensor_is_refused(llama):
    pico.rewrite(llama, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' of shape \(24,\) is missing"):
        open_checkpoint(llama).check()


def test_a_wrong_shape_is_refused(llama):
    pico.rewrite(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(23)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \(23,\); .* needs \(24,\)"):
        open_checkpoint(llama).check()


@pytest.mark.parametrize("keep", [4, 100, 5000])
def test_a_truncated_file_is_refused(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: is (truncated|not a safetensors file)"):
        open_checkpoint(llama)


def test_the_size_of_a_truncated_file_is_told(llama):
    path = llama / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"it has {whole - 7} bytes, its header promises {whole}"):
        open_checkpoint(llama)


def test_packed_weights_are_refused(llama):
    pico.rewrite(llama, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(2, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"is already quantised; found 'model.layers.0.mlp.up_proj.qweight'"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "madeup"}, "model_type 'madeup', which transformers .* does not know"),
        ({"architectures": ["LlamaForNothing"]}, "names architecture 'LlamaForNothing'"),
        ({"architectures": ["__version__"]}, "names architecture '__version__'"),
    ],
)
def test_unknown_architectures_are_refused_and_no_remote_code_is_run(llama, change, message):
    config = json.loads((llama / "config.json").read_text()) | change | {"auto_map": {"AutoModel": "evil.Evil"}}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(llama).build()


def test_the_tokenizer_is_written_without_spaces(llama, tmp_path):
    content = {"model": {"vocab": {"né": 0, "b c": 1}}, "version": "1.0"}
    (llama / "tokenizer.json").write_text(json.dumps(content, indent=2))
    (llama / "merges.txt").write_text("a b\n")
    written = open_checkpoint(llama).write_tokenizer(tmp_path / "out")
    assert [path.name for path in written] == ["generation_config.json", "merges.txt", "tokenizer.json"]
    text = (tmp_path / "out" / "tokenizer.json").read_text()
    assert text == '{"model":{"vocab":{"né":0,"b c":1}},"version":"1.0"}'


@pytest.mark.parametrize(
    ("merges", "stored"),
    [
        ([["a", "b"], ["é", "b"]], ["a b", "é b"]),
        ([["a", "b c"]], [["a", "b c"]]),  # a text would be of three parts
        (["a b"], ["a b"]),
        ([], []),
    ],
)
def test_merges_are_written_as_texts_where_these_say_the_same(llama, tmp_path, merges, stored):
    (llama / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}, "merges": merges}}))
    open_checkpoint(llama).write_tokenizer(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert found == {"model": {"vocab": {"a": 0}, "merges": stored}}


def test_the_digest_changes_with_the_weights(llama):
    before = open_checkpoint(llama).digest()
    assert before == open_checkpoint(llama).digest()
    pico.rewrite(llama, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert open_checkpoint(llama).digest() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pt", None, "gone.pt: does not exist"),
        ("weights.h5", b"x", "files ending in '.h5' are not supported; supported are .pt"),
        ("empty.safetensors", b"", "empty.safetensors: the file is empty"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        ("noise.safetensors", b"\xff" * 64, "is not a safetensors file"),
        ("noise.pt", b"hello world", "is not a torch.save file"),
        ("noise.gguf", b"hello world", "is not a GGUF file"),
        ("short.gguf", b"GGUF\x03\x00\x00\x00", "is truncated or corrupt"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / name)


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights; found config.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "bert", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma", "opt"]
)
def test_the_default_of_ties_is_that_of_transformers(model_type):
    default = CONFIG_MAPPING[model_type]().tie_word_embeddings
    assert default is (model_type not in UNTIED_BY_DEFAULT)


@pytest.mark.parametrize("kind", sorted(ENCODER_TYPES))
def test_kinds_of_encoders_take_text_alone(kind):
    """By their class for classes of texts, or for spans: tokens, and nothing else that has no default."""
    names = {**MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, **MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}
    network = getattr(transformers, names[kind])
    arguments = inspect.signature(network.forward).parameters.values()
    needed = [each.name for each in arguments if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    assert network.main_input_name == "input_ids"
    assert set(needed) <= {"self", "input_ids"}
    assert family_of({"model_type": kind, "architectures": [names[kind]]}) == "encoder"
