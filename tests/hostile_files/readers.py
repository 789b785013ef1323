"""Files that were damaged, by chance or on purpose, and what reads them: for a short test and for scripts/fuzz.py.

A reader may answer with content or with a CompressorError, within seconds and without much memory; nothing else.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from tokenizers import Tokenizer

from compressor.batch.manifest import read_manifest
from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CompressorError
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.data import load as load_data
from compressor.data.tokens import tokenize
from compressor.evaluate.verification import verify
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.report.difference import compare
from compressor.report.page import write_page
from tests import pico
from tests.hostile_files.mutations import MUTATIONS
from tests.onnx import graphs

INTEGERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
WORDS = (
    b"-1", b"0", b"1e999", b"99999999999999999999", b"null", b"[]", b"{}", b'""', b'"../../x"', b"NaN", b"true",
    b"[[[[[[]]]]]]", b"1000000000", b'"\\u0000"', b"*a", b"!!python/object/apply:os.system [id]",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """How a good file is written into a folder (its path is returned), how it is read, and what it is inside.

    Of a format of `mutations.MUTATIONS` the file is also taken apart and put together wrongly.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    format: str = ""

    def wrong(self, content: bytes, generator: random.Random) -> bytes:
        """The content with something wrong with its bytes, or with what they say."""
        mutate = MUTATIONS.get(self.format)
        return damaged(content, generator) if mutate is None or generator.random() < 0.4 else mutate(content, generator)


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The content with one to four things wrong with it."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        (kind,) = generator.choices(range(7), (1, 4, 4, 4, 2, 2, 8))
        # Headers and indices are at the ends, and that is where damage tells.
        span = generator.choice((len(found), min(len(found), 400), min(len(found), 64)))
        at = generator.randrange(span + 1)
        at = len(found) - at if generator.random() < 0.3 else at
        if kind == 0:
            del found[at:]
        elif kind == 1 and found:
            found[min(at, len(found) - 1)] ^= 1 << generator.randrange(8)
        elif kind == 2:
            found[at : at + 8] = generator.choice(INTEGERS).to_bytes(8, "little")
        elif kind == 3:
            found[at : at + 4] = (generator.choice(INTEGERS) & 0xFFFFFFFF).to_bytes(4, "little")
        elif kind == 4:
            found[at:at] = generator.randbytes(generator.randint(1, 40))
        elif kind == 5:
            length = generator.randint(1, 60)
            found[at:at] = found[at : at + length] * generator.randint(1, 3)
        else:
            _replace_a_word(found, generator)
    return bytes(found)


def _replace_a_word(found: bytearray, generator: random.Random) -> None:
    words = [match.span() for match in re.finditer(rb'-?\d+(\.\d+)?|"[^"\n]{0,60}"|\w+', bytes(found[:20_000]))]
    if words:
        start, end = generator.choice(words)
        found[start:end] = generator.choice(WORDS)


def attempt(reader: Reader, path: Path) -> str | None:
    """Reads; returns the message of a refusal, None where the file was taken. Any other exception is a finding."""
    try:
        reader.read(path)
    except CompressorError as error:
        assert str(error).strip()
        return str(error)
    return None


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(6, 4, generator=generator), "a.bias": torch.zeros(6), "n": torch.tensor(3)}


def _safetensors(folder: Path) -> Path:
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def _zipped(folder: Path) -> Path:
    torch.save({"state_dict": _weights()}, folder / "model.pt")
    return folder / "model.pt"


def _legacy(folder: Path) -> Path:
    torch.save(_weights(), folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


def _scripted(folder: Path) -> Path:
    torch.jit.save(torch.jit.script(torch.nn.Linear(4, 3)), folder / "model.pt")
    return folder / "model.pt"


def _gguf(folder: Path) -> Path:
    writer = GGUFWriter(folder / "model.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 8),
        (writer.add_feed_forward_length, 8), (writer.add_head_count, 2), (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    for name, shape in (("token_embd", (16, 8)), ("blk.0.attn_q", (8, 8)), ("output_norm", (8,))):
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def _tensors_of(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def _config(folder: Path) -> Path:
    return pico.llama(folder / "llama", n_layers=1) / "config.json"


def _built(path: Path) -> None:
    open_checkpoint(path.parent).check()


def _index(folder: Path) -> Path:
    _safetensors(folder)
    index = {"metadata": {"total_size": 120}, "weight_map": dict.fromkeys(_weights(), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def _tokenizer(folder: Path) -> Path:
    pico.write_tokenizer(folder)
    small = json.loads((folder / "tokenizer.json").read_text())
    small["model"]["vocab"] = dict(list(small["model"]["vocab"].items())[:260])
    small["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(small))
    Tokenizer.from_file(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _tokens(path: Path) -> None:
    tokenize("the river", path.parent, path.parent / "cache")


def _recipe(folder: Path) -> Path:
    source = Path(__file__).parents[2] / "recipes" / "llm-sparse-4bit.yaml"
    return Path(shutil.copy(source, folder / "recipe.yaml"))


def _manifest(folder: Path) -> Path:
    _safetensors(folder)
    text = "recipe: llm-4bit\ngates: {max_loss: 5%}\nset: {calibration.tokens: 64}\nmodels:\n  - model.safetensors\n"
    text += "  - {path: '*.safetensors', name: other, recipes: [llm-2bit], seed: 3, target_size: 1MB}\n"
    (folder / "manifest.yaml").write_text(text)
    return folder / "manifest.yaml"


REPORT = {
    "compressor": "0.1.0", "seed": 0, "mode": "default",
    "source": {"path": "gone", "architecture": "Net", "sha256": "0", "tensor_bytes": 120, "n_parameters": 30},
    "size": {"bytes": 10, "original_bytes": 20, "files": {"model.safetensors": 10}},
    "sha256": {"model.safetensors": "0"},
    "recipe": {"name": "r", "passes": [{"pass": "affine", "bits": 4}], "gates": {"max_loss": 0.5}},
    "quality": {"ratio": 1.1, "perplexity": 3.0}, "errors": {"a.weight": 0.1, "a.bias": 0.2},
    "versions": {"torch": "2"},
    "cost": {"export": {"seconds": 1.0, "cpu_seconds": 0.5, "peak_memory": 9}}, "data": {"calibration": "x"},
    "gates": {"passed": False, "failures": ["f"], "blame": [{"tensors": "a", "by": "affine", "share": 0.5}]},
    "speed": {"latency_seconds": 0.1, "memory": {"peak_private": 3}}, "original_speed": {"latency_seconds": 0.2},
}  # fmt: skip


def _artifact(folder: Path) -> Path:
    tensors = {name: EncodedTensor.dense(tensor, tensor.dtype) for name, tensor in _weights().items()}
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "compression.json").write_text(json.dumps(REPORT))
    return folder / "compression.json"


def _shown(path: Path) -> None:
    verify(path.parent)
    write_page([path.parent], path.parent / "page.html")


def _packed(folder: Path) -> Path:
    _artifact(folder)
    return folder / "model.safetensors"


def _decoded(path: Path) -> None:
    compare(path.parent, path.parent)
    for tensor in EncodedTensors([path]).values():
        tensor.decode()


def _arrays(folder: Path) -> Path:
    np.savez(folder / "data.npz", x=np.ones((4, 3), np.float32), labels=np.arange(4))
    return folder / "data.npz"


def _lines(folder: Path) -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(8)))
    return folder / "data.jsonl"


def _data(path: Path) -> None:
    load_data(str(path))


def _exported(folder: Path) -> Path:
    program = torch.export.export(torch.nn.Linear(4, 3), (torch.zeros(2, 4),))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


def _trusted(path: Path) -> None:
    checkpoint = open_checkpoint(path, trust_pickle=True)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def _onnx_of(path: Path) -> None:
    _tensors_of(path)
    make_plan(open_checkpoint(path), load_recipe("encoder-4bit"))


READERS = {
    "safetensors": Reader(_safetensors, _tensors_of, "safetensors"),
    "pt": Reader(_zipped, _tensors_of, "zip"),
    "pt-legacy": Reader(_legacy, _tensors_of),
    "torchscript": Reader(_scripted, lambda path: open_checkpoint(path, arch="tests.pico:Tied"), "zip"),
    "pt2": Reader(_exported, _trusted, "zip"),
    "onnx": Reader(graphs.tokens, _onnx_of, "onnx"),
    "onnx-external": Reader(graphs.external, _onnx_of, "onnx"),
    "gguf": Reader(_gguf, _tensors_of, "gguf"),
    "config": Reader(_config, _built, "json"),
    "index": Reader(_index, _tensors_of, "json"),
    "tokenizer": Reader(_tokenizer, _tokens, "json"),
    "recipe": Reader(_recipe, load_recipe, "yaml"),
    "manifest": Reader(_manifest, read_manifest, "yaml"),
    "artifact": Reader(_artifact, _shown, "json"),
    "packed": Reader(_packed, _decoded, "safetensors"),
    "npz": Reader(_arrays, _data, "zip"),
    "jsonl": Reader(_lines, _data),
}
