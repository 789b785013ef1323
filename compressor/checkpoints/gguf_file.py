"""GGUF files of the Llama, Mistral and Qwen families, tensor by tensor, by Hugging Face's names.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's converter permutes the rows
of Llama's query and key matrices, from rotary halves to interleaved pairs; here this is undone. Other
families are stored as they are.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.gguf_index import check_index
from compressor.checkpoints.source import Source, TensorInfo, refuse_empty
from compressor.core.errors import CheckpointError

if TYPE_CHECKING:
    import numpy
    import torch
    from gguf import GGUFReader

MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
SPECIAL_TOKENS = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "unk_token_id": "unknown",
    "pad_token_id": "padding",
}


_DAMAGED = (
    ValueError, ZeroDivisionError, TypeError, RuntimeError, IndexError, KeyError, OverflowError, AttributeError,
)  # fmt: skip
"""What the index and the metadata of a damaged file lead to."""


@dataclass
class GgufSource(Source):
    """One GGUF file; `config` is made from its metadata."""

    config: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)
    permuted_heads: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, config: dict[str, Any] | None = None) -> GgufSource:
        """Open a file; a config that is given says what metadata cannot, such as a rotary scaling."""
        reader = open_reader(path)
        try:
            return cls._described(path, reader, config)
        except _DAMAGED as error:
            raise CheckpointError(f"{path}: its metadata are corrupt; {error!r}; fetch it again") from error

    @classmethod
    def _described(cls, path: Path, reader: GGUFReader, config: dict[str, Any] | None) -> GgufSource:
        if int(metadata(reader, "split.count") or 1) > 1:
            raise CheckpointError(f"{path}: is one part of a split file; join the parts with llama-gguf-split --merge")
        config = config or read_config(path, reader)
        entries = {hugging_face_name(path, entry.name): entry for entry in reader.tensors}
        entries.pop("rope_freqs.weight", None)
        infos = {
            name: TensorInfo(
                name,
                tuple(int(size) for size in reversed(entry.shape)),
                entry.tensor_type.name,
                int(entry.n_bytes),
            )
            for name, entry in entries.items()
        }
        heads = permuted_heads(reader, infos)
        return cls("gguf", [path], infos, config=config, entries=entries, permuted_heads=heads)

    def file_of(self, name: str) -> Path:
        return self.files[0]

    def read(self, name: str) -> torch.Tensor:
        import numpy
        import torch
        from gguf.quants import dequantize

        entry = self.entries[name]
        try:
            values = dequantize(entry.data, entry.tensor_type)
            if name in self.permuted_heads:
                values = restore_rows(values, self.permuted_heads[name])
            return torch.from_numpy(numpy.array(values, dtype=numpy.float32)).reshape(self.tensors[name].shape)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.files[0]}: tensor '{name}' is stored as {entry.tensor_type.name}, which the gguf "
                "package cannot decode; give a file in another quantisation"
            ) from error
        except _DAMAGED as error:
            raise CheckpointError(
                f"{self.files[0]}: tensor '{name}' cannot be what its metadata say; {error}; fetch it again"
            ) from error


def restore_rows(values: numpy.ndarray, n_heads: int) -> numpy.ndarray:
    """Undo llama.cpp's permutation of rows: per head, pairs (i, half) back to halves (half, i)."""
    half = values.shape[0] // n_heads // 2
    return values.reshape(n_heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def permuted_heads(reader: GGUFReader, names: dict[str, TensorInfo]) -> dict[str, int]:
    """The tensors whose rows are permuted, and the heads of each."""
    if metadata(reader, "general.architecture") != "llama":
        return {}
    n_heads = metadata(reader, "llama.attention.head_count")
    heads = {"q_proj": n_heads, "k_proj": metadata(reader, "llama.attention.head_count_kv") or n_heads}
    return {name: heads[name.split(".")[-2]] for name in names if name.split(".")[-2] in heads}


def open_reader(path: Path) -> GGUFReader:
    """The mapped file, its index checked against its size."""
    from gguf import GGUFReader

    refuse_empty(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: is not a GGUF file; it starts with {magic!r}; give a file of llama.cpp")
    check_index(path)
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is truncated or corrupt; it has {path.stat().st_size} bytes, and its index asks for "
            f"more ({error}); fetch it again"
        ) from error
    return reader


def metadata(reader: GGUFReader, key: str) -> Any:
    """A metadata value, or None."""
    found = reader.fields.get(key)
    return None if found is None else found.contents()


def hugging_face_name(path: Path, name: str) -> str:
    """A tensor's name in transformers' state dict."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in INNER:
        return f"model.layers.{block[1]}.{INNER[block[2]]}.{kind}"
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    if name == "rope_freqs.weight":
        return name
    raise CheckpointError(
        f"{path}: tensor '{name}' has no place in the Llama and Qwen families; give the Hugging Face directory instead"
    )


def read_config(path: Path, reader: GGUFReader) -> dict[str, Any]:
    """The transformers config that a file's metadata describe."""
    family = metadata(reader, "general.architecture")
    if family not in MODEL_CLASSES:
        raise CheckpointError(
            f"{path}: is of architecture '{family}'; known: {', '.join(sorted(MODEL_CLASSES))}; give the "
            "Hugging Face directory instead"
        )
    config: dict[str, Any] = {"architectures": [MODEL_CLASSES[family]], "model_type": family}
    for key, suffix in CONFIG_KEYS.items():
        value = metadata(reader, f"{family}.{suffix}")
        if value is None:
            raise CheckpointError(f"{path}: its metadata lack '{family}.{suffix}'; convert the model again")
        config[key] = value
    config["num_key_value_heads"] = (
        metadata(reader, f"{family}.attention.head_count_kv") or config["num_attention_heads"]
    )
    _refuse_per_layer(path, config)
    _refuse_scaled_rotary(path, reader)
    head_dim = metadata(reader, f"{family}.attention.key_length") or metadata(reader, f"{family}.rope.dimension_count")
    config["head_dim"] = head_dim or config["hidden_size"] // config["num_attention_heads"]
    base = metadata(reader, f"{family}.rope.freq_base") or 10000.0
    config["rope_theta"] = base
    config["rope_parameters"] = {"rope_theta": base, "rope_type": "default"}
    names = {entry.name: entry for entry in reader.tensors}
    if "token_embd.weight" not in names:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing; convert the model again")
    config["attention_bias"] = "blk.0.attn_output.bias" in names
    config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    config["vocab_size"] = int(names["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in names
    config["dtype"] = "float32"
    for key, name in SPECIAL_TOKENS.items():
        token = metadata(reader, f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[key] = token
    return config


def _refuse_scaled_rotary(path: Path, reader: GGUFReader) -> None:
    """Refuse a file whose rotary scaling would be lost: its table of factors does not say how it was made."""
    kind = metadata(reader, f"{metadata(reader, 'general.architecture')}.rope.scaling.type")
    table = any(entry.name == "rope_freqs.weight" for entry in reader.tensors)
    if table or kind not in (None, "none"):
        found = "a table of rotary factors" if table else f"rotary scaling '{kind}'"
        raise CheckpointError(
            f"{path}: has {found}, whose settings are not in its metadata; give --arch DIR with the model's config.json"
        )


def _refuse_per_layer(path: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key != "architectures" and isinstance(value, list):
            raise CheckpointError(
                f"{path}: '{key}' differs from layer to layer; give the Hugging Face directory instead"
            )


def write_gguf_tokenizer(path: Path, directory: Path) -> list[Path]:
    """The tokenizer of a GGUF file, in Hugging Face's files. What lies beside the file is not looked at."""
    from transformers import AutoTokenizer

    from compressor.checkpoints.reach import offline
    from compressor.checkpoints.tokenizer import find_tokenizer, write_compact
    from compressor.core.reading import read_json

    try:
        with offline(), tempfile.TemporaryDirectory(prefix="compressor-") as alone:
            (Path(alone) / path.name).symlink_to(path.resolve())
            tokenizer = AutoTokenizer.from_pretrained(
                alone, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
            directory.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(directory)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path}: its tokenizer cannot be read; {error}; give --arch DIR with tokenizer.json"
        ) from error
    write_compact(read_json(directory / "tokenizer.json"), directory / "tokenizer.json")
    return find_tokenizer(directory)
