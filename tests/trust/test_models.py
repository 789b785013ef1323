"""Folders of models that name code, or something on a hub: nothing is run or fetched, and nobody is asked."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import transformers
from gguf import GGUFWriter
from huggingface_hub import constants

from compressor.checkpoints import open_checkpoint
from compressor.checkpoints.architecture import build_transformers
from compressor.checkpoints.gguf_file import write_gguf_tokenizer
from compressor.checkpoints.reach import offline, to_build
from compressor.core.errors import CheckpointError, DataError
from compressor.core.options import RunOptions
from compressor.data.tokens import tokenize
from compressor.run.pipeline import run
from tests import pico

AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
AUTO_MAP |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


class Asked(AssertionError):
    """Somebody was asked."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No prompt can be answered and no connection made, though the hub's library believes itself online."""

    def refuse(*args, **more):
        raise Asked(args)

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_no_kind_of_model_asks_whether_to_run_its_code(evil):
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kinds = [kind for kind in transformers.CONFIG_MAPPING if kind not in MODEL_MAPPING_NAMES]
    assert len(kinds) > 100
    for kind in kinds:
        with pytest.raises(CheckpointError, match=r"config.json"):
            build_transformers(Path("x"), {"model_type": kind, "auto_map": AUTO_MAP})
    assert evil.read() == []


def gguf(folder: Path) -> Path:
    """A file with a tokenizer of bytes."""
    writer = GGUFWriter(folder / "model.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 8),
        (writer.add_feed_forward_length, 8), (writer.add_head_count, 2), (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    pico.write_tokenizer(folder)
    known = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(known["vocab"], key=known["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in known["merges"]])
    writer.add_token_types([1] * len(known["vocab"]))
    (folder / "tokenizer.json").unlink()
    writer.add_tensor("token_embd.weight", np.ones((len(known["vocab"]), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def test_what_lies_beside_a_gguf_file_is_not_looked_at(evil, here):
    file = gguf(here)
    (here / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": AUTO_MAP}))
    (here / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO_MAP, "tokenizer_class": "Evil"}))
    write_gguf_tokenizer(file, here / "out")
    assert (here / "out" / "tokenizer.json").is_file()
    assert len(tokenize("the river", here / "out", here / "cache"))
    assert evil.read() == []
    assert "auto_map" not in (here / "out" / "tokenizer_config.json").read_text()


def test_a_tokenizer_that_needs_its_own_code_is_refused(evil, here):
    (here / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO_MAP, "tokenizer_class": "Evil"}))
    (here / "vocab.txt").write_text("the\nriver\n")
    with pytest.raises(DataError, match="its tokenizer cannot be read"):
        tokenize("the river", here, here / "cache")
    assert evil.read() == []


def changed(llama: Path, here: Path, **more) -> Path:
    folder = Path(shutil.copytree(llama, here / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"backbone": "evil/backbone"}, "names backbone 'evil/backbone', which would be fetched"),
        ({"vision_config": {"backbone": "hf-hub:evil"}}, "names backbone 'hf-hub:evil'"),
        ({"attn_implementation": "evil/kernel"}, "names attn_implementation 'evil/kernel'"),
        ({"_attn_implementation": {"": "evil/kernel:x"}}, "names _attn_implementation 'evil/kernel:x'"),
        ({"_experts_implementation_internal": "evil/kernel"}, "names _experts_implementation_internal"),
        ({"sub": [{"kernel_config": {"RMSNorm": "evil/kernel"}}]}, "names kernel_config 'evil/kernel'"),
    ],
)
def test_what_a_config_would_fetch_is_refused_by_name(llama, here, evil, more, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(changed(llama, here, **more)).check()
    assert evil.read() == []


def test_a_plain_backbone_asks_no_hub(here):
    config = {"model_type": "detr", "architectures": ["DetrModel"], "backbone": "resnet50", "backbone_kwargs": {"a": 1}}
    with pytest.raises(CheckpointError, match="is not in the folder, and nothing is ever fetched for a config"):
        build_transformers(here, config)


def test_where_a_model_came_from_is_no_place_to_go_back_to(llama, here):
    folder = changed(llama, here, _name_or_path="evil/model", name_or_path="evil/model", _commit_hash="0" * 40)
    open_checkpoint(folder).check()
    assert "evil" not in json.dumps(to_build(folder, json.loads((folder / "config.json").read_text())))


def test_an_artifact_names_no_code(llama, here, evil):
    folder = changed(llama, here, auto_map=AUTO_MAP, further={"auto_map": AUTO_MAP})
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO_MAP, "eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "evil/generate", "eos_token_id": 1}))
    (here / "r.yaml").write_text(
        "passes: [{pass: affine, method: rtn, bits: 4, group: 16}]\nevaluation: {tokens: 0, speed: false}\n"
        "calibration: {tokens: 64, window: 32}\n"
    )
    (here / "text.txt").write_text(pico.text(1, 400))
    (here / "other.txt").write_text(pico.text(2, 400))
    run(RunOptions(str(folder), "r.yaml", Path("out"), data="text.txt", eval="other.txt", format="safetensors"))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert "evil" not in (here / "out" / name).read_text()
    assert json.loads((here / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    assert evil.read() == []


def test_offline_lasts_as_long_as_it_is_asked_for():
    with offline():
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False
