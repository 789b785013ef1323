"""Pico networks, and their layers encoded without any method: the graph must not care which values it computes with."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
import transformers
from torch import nn

from compressor.core.encoding import Affine, Codebook, Dense, Scales
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.export.module import export_module, trace_module
from compressor.graph.blocks import layers, layout_of

BERT = {
    "vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80,
    "max_position_embeddings": 40, "architectures": ["BertModel"],
}  # fmt: skip
ALBERT = BERT | {"embedding_size": 32, "num_hidden_layers": 3, "architectures": ["AlbertForMaskedLM"]}
GPT2 = {
    "vocab_size": 83, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 40, "architectures": ["GPT2LMHeadModel"],
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def pico(kind: str, settings: dict) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind].from_dict(settings)
    module = getattr(transformers, settings["architectures"][0])(config).eval()
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def tokens(batch: int, length: int, **more: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 83, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    extra = {name: torch.full_like(ids, value) for name, value in more.items()}
    return {"input_ids": ids, "attention_mask": mask, **extra}


def first_output(module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(module(**inputs).values()))


class Tied(nn.Module):
    """A table that is embedding, head, and factor of something that no exporter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50)
        self.head.weight = self.table.weight
        self.mix = nn.Parameter(torch.randn(32, 32) / 6)
        self.register_buffer("shift", torch.arange(50))

    def forward(self, ids: torch.Tensor, gain: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.table((ids + self.shift[3]) % 50) @ self.mix * gain.unsqueeze(-1).unsqueeze(-1)
        return {"scores": self.head(hidden), "norm": (self.table.weight * self.table.weight).sum(1) + hidden.mean()}


def rounded(weight: torch.Tensor, bits: int = 4, group: int = 16, half: bool = False) -> Affine:
    """To the nearest step of a grid per group of a row, zero in its middle or half a step beside."""
    grouped = nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    zero = 2 ** (bits - 1) - (0.5 if half else 0.0)
    scales = Scales.of(grouped.abs().amax(-1).clamp_min(1e-4) / zero)
    codes = (grouped / scales.decode().unsqueeze(-1) + zero).round().clamp(0, 2**bits - 1).int().flatten(1)
    return Affine(tuple(weight.shape), group, codes, scales, bits, zero)


def vectors(
    weight: torch.Tensor, width: int = 8, dim: int = 4, group: int = 32, books: int = 1, ordered: bool = True
) -> Codebook:
    """Codes drawn at random: the graph must not care."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**width, (rows, groups * group // dim), generator=generator, dtype=torch.int32)
    table = torch.randint(-8, 8, (books, 2**width, dim), generator=generator).to(torch.int8)
    scales = Scales.of(torch.full((rows, groups), float(weight.std()) / 4.6))
    order = torch.randperm(rows, generator=generator) if ordered else None
    of_book = tuple(rows // books + (book >= books - rows % books) for book in range(books))
    return Codebook((rows, columns), width, dim, group, codes, table, scales, of_book, order)


ENCODERS = {
    "dense": lambda weight: Dense(tuple(weight.shape), weight.half()),
    "affine2": lambda weight: rounded(weight, 2, 32),
    "affine4": rounded,
    "vectors": vectors,
}


def compressed(module: nn.Module, directory: Path, encode=rounded) -> EncodedTensors:
    """The module's tensors, its layers encoded, in a file; the module itself then holds the decoded ones."""
    found, tensors, ties, first = layers(module), {}, {}, {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        ties |= {name: canonical} if canonical != name else {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        layout = layout_of(found[name]) if name in found else None
        if layout is not None:
            tensors[name] = EncodedTensor(encode(layout.matrix(tensor.data)), layout)
            tensor.data = tensors[name].decode()
        elif name not in ties:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensors[name] = EncodedTensor.dense(tensor.data, dtype)
    write_tensors(directory / "model.safetensors", tensors, ties)
    return EncodedTensors([directory / "model.safetensors"])


def opened(path: Path) -> onnxruntime.InferenceSession:
    """A session of one thread whose products are exact."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path, options)


_TRACES: dict[str, ir.Model] = {}


def traced_and_written(module, example, tensors, folder: Path, *args, like: str = "", **settings) -> Path:
    """The file of a module's graph; modules that are `like` one another are traced once, as a run's are."""
    traced = _TRACES.get(like) or trace_module(module, example, tensors, folder / "model.onnx")
    if like:
        _TRACES[like] = traced
    return export_module(traced.clone(), tensors, folder, *args, **settings)
