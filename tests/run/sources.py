"""Small networks of every kind that a run takes, or refuses, each with the words of the command that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFWriter

from compressor.checkpoints.gguf_file import INNER, OUTER
from tests import pico
from tests.graph import zoo
from tests.onnx import graphs

WORDS = pico.VOCABULARY
TEXT = ("--data", "calibration.txt", "--eval", "evaluation.txt")
SMALL = {"vocab_size": WORDS, "hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def _saved(kind: str, folder: Path, **settings: object) -> None:
    model = getattr(transformers, kind)
    pico.saved(model.config_class(**settings), model, folder)


def _gpt2_of_few_positions(folder: Path) -> None:
    _saved("GPT2LMHeadModel", folder, vocab_size=WORDS, n_embd=72, n_layer=2, n_head=3, n_positions=40)


def _roberta(folder: Path) -> None:
    _saved("RobertaForMaskedLM", folder, vocab_size=WORDS, hidden_size=72, intermediate_size=100, num_hidden_layers=2,
           num_attention_heads=3, max_position_embeddings=66, pad_token_id=1)  # fmt: skip


def _t5(folder: Path) -> None:
    _saved("T5ForConditionalGeneration", folder, vocab_size=WORDS, d_model=72, d_kv=24, d_ff=100, num_layers=2,
           num_heads=3, decoder_start_token_id=0, pad_token_id=0)  # fmt: skip


def _mixtral(folder: Path) -> None:
    _saved("MixtralForCausalLM", folder, **SMALL, intermediate_size=100, num_key_value_heads=2, num_local_experts=2,
           bos_token_id=0, eos_token_id=1)  # fmt: skip


def _neox(folder: Path) -> None:
    """Of which transformers calls the head otherwise in the file than in the module."""
    _saved("GPTNeoXForCausalLM", folder, **SMALL, intermediate_size=108, max_position_embeddings=64)


def _vit(folder: Path) -> None:
    _saved("ViTForImageClassification", folder, hidden_size=72, num_hidden_layers=2, num_attention_heads=3,
           intermediate_size=100, image_size=16, patch_size=4, num_labels=7)  # fmt: skip


def _gguf(folder: Path) -> None:
    """A llama in a file of Qwen's family, whose rows are stored as they are, with a tokenizer in it."""
    pico.llama(folder / "llama")
    module = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    config, writer = module.config, GGUFWriter(folder / "pico.gguf", "qwen2")
    for add, value in (
        (writer.add_block_count, config.num_hidden_layers), (writer.add_embedding_length, config.hidden_size),
        (writer.add_context_length, 128), (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads), (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_key_length, config.head_dim), (writer.add_vocab_size, WORDS),
        (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1),
    ):  # fmt: skip
        add(value)
    inner, outer = ({new: old for old, new in names.items()} for names in (INNER, OUTER))
    for name, tensor in module.state_dict().items():
        stem, _, kind = name.rpartition(".")
        _, layers, number, *part = [*stem.split("."), "", ""]
        short = f"blk.{number}.{inner['.'.join(part).strip('.')]}" if layers == "layers" else outer[stem]
        if name != "lm_head.weight":
            writer.add_tensor(f"{short}.{kind}", tensor.numpy().astype(np.float32))
    for number in range(config.num_hidden_layers):
        for part, n in (("q", 80), ("k", 16), ("v", 16)):
            writer.add_tensor(f"blk.{number}.attn_{part}.bias", np.zeros(n, np.float32))
    model = json.loads((folder / "llama" / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].__getitem__))
    writer.add_token_types([1] * len(model["vocab"]))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.rmtree(folder / "llama")


def _in_folder(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        folder.mkdir()
        make(folder)

    return made


SOURCES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "llama": (pico.llama, ("llama", *TEXT)),
    "gpt2": (pico.gpt2, ("gpt2", *TEXT)),
    "few": (_gpt2_of_few_positions, ("few", *TEXT)),
    "bert": (pico.bert, ("bert", *TEXT)),
    "albert": (pico.albert, ("albert", *TEXT)),
    "roberta": (_roberta, ("roberta", *TEXT)),
    "t5": (_t5, ("t5", "--data", "sequences.npz")),
    "t5-alone": (_t5, ("t5-alone",)),
    "mixtral": (_mixtral, ("mixtral", *TEXT)),
    "neox": (_neox, ("neox", *TEXT)),
    "vit": (_vit, ("vit", "--data", "pixels.npz")),
    "resnet.pt": (lambda path: pico.write_state_dict(pico.ResNet, path),
                  ("resnet.pt", "--arch", "tests.pico:ResNet", "--data", "images.npz")),
    "tied.pt": (lambda path: pico.write_state_dict(pico.Tied, path),
                ("tied.pt", "--arch", "tests.pico:Tied", "--data", "vectors.npz")),
    "custom.pt": (lambda path: torch.save(zoo.build("custom"), path),
                  ("custom.pt", "--trust-pickle", "--data", "large.npz")),
    "images": (_in_folder(graphs.images), ("images", "--data", "pixels.npz")),
    "tokens": (_in_folder(graphs.tokens), ("tokens", "--data", "tokens.npz")),
    "decoder": (_in_folder(graphs.decoder), ("decoder", *TEXT)),
    "gguf": (_in_folder(_gguf), ("gguf/pico.gguf", *TEXT)),
}  # fmt: skip
"""Name -> how it is made at a path, and the words after `compress` that name it and its data."""


def write_sources(folder: Path) -> None:
    """All of them, and the data."""
    for name, (make, _) in SOURCES.items():
        make(folder / name)
    for seed, name in enumerate(("calibration", "evaluation"), start=1):
        (folder / f"{name}.txt").write_text(pico.text(seed, 3000))
    generator = np.random.default_rng(0)
    floats = {"images": (3, 12, 12), "vectors": (70,), "large": (3, 16, 16)}
    for name, shape in floats.items():
        labels = {"labels": generator.integers(0, 7, 48)} if name == "images" else {}
        np.savez(folder / f"{name}.npz", x=generator.normal(size=(48, *shape)).astype(np.float32), **labels)
    np.savez(folder / "pixels.npz", pixel_values=generator.normal(size=(48, 3, 16, 16)).astype(np.float32))
    np.savez(folder / "tokens.npz", input_ids=graphs.tokens_data(48))
    sequences = {"input_ids": 12, "attention_mask": 12, "decoder_input_ids": 7}
    np.savez(folder / "sequences.npz", **{
        name: np.ones((48, n), np.int64) if "mask" in name else generator.integers(2, WORDS, (48, n))
        for name, n in sequences.items()
    })  # fmt: skip
