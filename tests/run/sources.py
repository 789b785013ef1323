"""Small networks of every kind that a run takes, or refuses, each with the words of the command that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH

from tests import pico
from tests.gguf_files import write_gguf
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
    """A file of Qwen's family, with a tokenizer in it."""
    config = transformers.Qwen2Config(
        **SMALL | {"num_attention_heads": 5, "num_hidden_layers": 3}, intermediate_size=108, num_key_value_heads=1,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pico.write_tokenizer(folder)
    module = pico.lively(transformers.Qwen2ForCausalLM(config), 0)
    write_gguf(module, MODEL_ARCH.QWEN2, folder / "pico.gguf", folder / "tokenizer.json")
    (folder / "tokenizer.json").unlink()


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
