"""GGUF files of Llama's kin, tensor by tensor, by Hugging Face's names: all that `export.decoder` writes a graph of.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's converter permutes the rows
of Llama's query and key matrices, from rotary halves to interleaved pairs, and adds to Gemma's norms the one
that the network adds when it runs; here this is undone. All else is stored as it is.
"""

from __future__ import annotations

import functools
import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoints.gguf_index import Entry, Index, read_index
from compressor.checkpoints.source import Source, TensorInfo
from compressor.checkpoints.tokenizer import find_tokenizer, write_compact
from compressor.core.errors import CheckpointError

if TYPE_CHECKING:
    import numpy
    import torch

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
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Norms before and after each half of a block, as Gemma has them since its second generation; Olmo 2 those after."""
TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors of rotary positions, which the network makes of its config."""
CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_GEMMA_KEYS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
}
_GRANITE_KEYS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores the networks of an architecture.

    model_class   transformers' class of them
    model_type    what their config calls them; the architecture where it is empty
    inner         names within a block, where they are not those of INNER
    keys          entries that the config has besides CONFIG_KEYS where the metadata have them
    permuted      the rows of queries and keys are permuted
    around_one    norms are stored with the one that the network adds to them
    share_scaled_at  with so many blocks attention is scaled by the width of a head's share of the hidden size, not by
                     that of its keys: the metadata do not say so
    every_nth     of so many layers the last attends to everything, the others to a window; 0: the config's class knows
    """

    model_class: str
    model_type: str = ""
    inner: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    permuted: bool = False
    around_one: bool = False
    share_scaled_at: int = 0
    every_nth: int = 0


FAMILIES = {
    "llama": Family("LlamaForCausalLM", permuted=True),
    "mistral": Family("MistralForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM", permuted=True),
    "granite": Family("GraniteForCausalLM", keys=_GRANITE_KEYS, permuted=True),
    "olmo2": Family("Olmo2ForCausalLM", inner=_SANDWICH),
    "phi3": Family(
        "Phi3ForCausalLM", inner={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        keys={"sliding_window": "attention.sliding_window"},
    ),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "gemma": Family("GemmaForCausalLM", around_one=True),
    "gemma2": Family("Gemma2ForCausalLM", inner=_SANDWICH, keys=_GEMMA_KEYS, around_one=True, share_scaled_at=46),
    "gemma3": Family(
        "Gemma3ForCausalLM", "gemma3_text", _SANDWICH, _GEMMA_KEYS, around_one=True, share_scaled_at=62, every_nth=6
    ),
}  # fmt: skip
"""By the architecture that the metadata name."""
LOCAL_THETA = 10000.0
"""Of Gemma 3's layers that attend to a window."""
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
    entries: dict[str, Entry] = field(default_factory=dict)
    permuted_heads: dict[str, int] = field(default_factory=dict)
    around_one: bool = False

    @classmethod
    def open(cls, path: Path, config: dict[str, Any] | None = None) -> GgufSource:
        """Open a file; a config that is given says what metadata cannot, such as a rotary scaling."""
        index = read_index(path)
        try:
            return cls._described(path, index, config)
        except _DAMAGED as error:
            raise CheckpointError(f"{path}: its metadata are corrupt; {error!r}; fetch it again") from error

    @classmethod
    def _described(cls, path: Path, index: Index, config: dict[str, Any] | None) -> GgufSource:
        if int(index.metadata.get("split.count") or 1) > 1:
            raise CheckpointError(f"{path}: is one part of a split file; join the parts with llama-gguf-split --merge")
        family = family_of(path, index)
        config = config or read_config(path, index)
        entries = {hugging_face_name(path, entry.name, family): entry for entry in index.entries}
        entries = {name: entry for name, entry in entries.items() if name not in TABLES}
        infos = {name: _info(path, name, entry) for name, entry in entries.items()}
        return cls(
            "gguf", [path], infos, config=config, entries=entries, around_one=family.around_one,
            permuted_heads=permuted_heads(index, infos) if family.permuted else {},
        )  # fmt: skip

    def file_of(self, name: str) -> Path:
        return self.files[0]

    def read(self, name: str) -> torch.Tensor:
        import numpy
        import torch
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        entry, info = self.entries[name], self.tensors[name]
        kind = GGMLQuantizationType(entry.kind)
        try:
            stored = numpy.memmap(self.files[0], numpy.uint8, "r", entry.begin, (info.nbytes,))
            values = dequantize(stored.reshape(quant_shape_to_byte_shape(info.shape, kind)), kind)
            if name in self.permuted_heads:
                values = restore_rows(values, self.permuted_heads[name])
            if self.around_one and name.endswith("norm.weight"):
                values = values - numpy.float32(1)
            return torch.from_numpy(numpy.array(values, dtype=numpy.float32)).reshape(info.shape)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.files[0]}: tensor '{name}' is stored as {kind.name}, which the gguf "
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


def permuted_heads(index: Index, names: dict[str, TensorInfo]) -> dict[str, int]:
    """The tensors whose rows are permuted in a file of such a family, and the heads of each."""
    n_heads = index.setting("attention.head_count")
    heads: dict[str, Any] = {
        "q_proj": n_heads,
        "k_proj": index.setting("attention.head_count_kv") or n_heads,
    }
    return {name: heads[name.split(".")[-2]] for name in names if name.split(".")[-2] in heads}


def _info(path: Path, name: str, entry: Entry) -> TensorInfo:
    """What is known of a tensor before it is read.

    Raises:
        CheckpointError: It reaches beyond the file, or is stored in a way that the gguf package does not know.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if entry.kind not in set(GGMLQuantizationType):
        raise CheckpointError(
            f"{path}: tensor '{name}' is stored in type {entry.kind}, which the gguf package does not know; give a "
            "file in another quantisation"
        )
    kind, n = GGMLQuantizationType(entry.kind), math.prod(entry.shape)
    block, n_bytes = GGML_QUANT_SIZES[kind]
    if n % block:
        raise CheckpointError(f"{path}: is corrupt; tensor '{name}' of shape {entry.shape} is no whole blocks")
    if entry.begin + n // block * n_bytes > (size := path.stat().st_size):
        raise CheckpointError(
            f"{path}: is truncated or corrupt; it has {size} bytes, and tensor '{name}' reaches beyond; fetch it again"
        )
    return TensorInfo(name, entry.shape, kind.name, n // block * n_bytes)


def family_of(path: Path, index: Index) -> Family:
    """What the file's metadata say that it is.

    Raises:
        CheckpointError: An architecture that is not among FAMILIES.
    """
    if index.architecture not in FAMILIES:
        raise CheckpointError(
            f"{path}: is of architecture '{index.architecture}'; known: {', '.join(sorted(FAMILIES))}; give the "
            "Hugging Face directory instead"
        )
    return FAMILIES[index.architecture]


def hugging_face_name(path: Path, name: str, family: Family) -> str:
    """A tensor's name in transformers' state dict."""
    inner = INNER | family.inner
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in inner:
        return f"model.layers.{block[1]}.{inner[block[2]]}.{kind}"
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    if name in TABLES:
        return name
    raise CheckpointError(
        f"{path}: tensor '{name}' has no place in a {family.model_class}; give the Hugging Face directory instead"
    )


def read_config(path: Path, index: Index) -> dict[str, Any]:
    """The transformers config that a file's metadata describe."""
    family = family_of(path, index)
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type or index.architecture,
    }
    for key, suffix in CONFIG_KEYS.items():
        value = index.setting(suffix)
        if value is None:
            raise CheckpointError(f"{path}: its metadata lack '{index.architecture}.{suffix}'; convert the model again")
        config[key] = value
    config["num_key_value_heads"] = index.setting("attention.head_count_kv") or config["num_attention_heads"]
    if index.architecture == "olmo2" and index.setting("attention.sliding_window"):
        raise CheckpointError(
            f"{path}: is an Olmo 3, which llama.cpp calls olmo2; give the Hugging Face directory instead"
        )
    config |= {key: value for key, suffix in family.keys.items() if (value := index.setting(suffix))}
    _refuse_per_layer(path, config)
    share = config["hidden_size"] // config["num_attention_heads"]
    head_dim = index.setting("attention.key_length") or index.setting("rope.dimension_count")
    config["head_dim"] = head_dim or share
    if family.share_scaled_at:
        whole = config["num_hidden_layers"] == family.share_scaled_at
        config["query_pre_attn_scalar"] = share if whole else config["head_dim"]
    config |= _rotary(path, index, family)
    if family.every_nth:
        config["layer_types"] = [
            "sliding_attention" if (layer + 1) % family.every_nth else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ]
    names = {entry.name: entry for entry in index.entries}
    if "token_embd.weight" not in names:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing; convert the model again")
    config["attention_bias"] = "blk.0.attn_output.bias" in names
    config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    config["vocab_size"] = int(names["token_embd.weight"].shape[0])
    config["tie_word_embeddings"] = "output.weight" not in names
    config |= {"dtype": "float32", "pad_token_id": None}  # classes have tokens of their own where it is absent
    for key, name in SPECIAL_TOKENS.items():
        token = index.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[key] = token
    return config


def _rotary(path: Path, index: Index, family: Family) -> dict[str, Any]:
    """What the config says of rotary positions: θ, and by how much positions are stretched.

    Raises:
        CheckpointError: Other scaling than linear, which would be lost: a table does not say how it was made.
    """
    kind, factor = (index.setting(f"rope.scaling.{key}") for key in ("type", "factor"))
    table = any(entry.name in TABLES for entry in index.entries)
    if table or kind not in (None, "none", "linear") or (kind == "linear" and not factor):
        found = "a table of rotary factors" if table else f"rotary scaling '{kind}'"
        raise CheckpointError(
            f"{path}: has {found}, whose settings are not in its metadata; give --arch DIR with the model's config.json"
        )
    base = index.setting("rope.freq_base") or 10000.0
    scaling = {"rope_type": "linear", "factor": factor} if kind == "linear" else {"rope_type": "default"}
    rope = {"rope_theta": base, **scaling}
    if not family.every_nth:
        return {"rope_theta": base, "rope_parameters": rope}
    local = index.setting("rope.freq_base_swa") or LOCAL_THETA
    return {
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    }


def _refuse_per_layer(path: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key != "architectures" and isinstance(value, list):
            raise CheckpointError(
                f"{path}: '{key}' differs from layer to layer; give the Hugging Face directory instead"
            )


def gguf_tokenizer(path: Path) -> list[Path]:
    """The tokenizer of a GGUF file in Hugging Face's files, in a folder that is removed when the process ends."""
    resolved = path.resolve()
    return find_tokenizer(Path(_written(resolved, resolved.stat().st_mtime_ns).name))


@functools.cache
def _written(path: Path, stamp: int) -> tempfile.TemporaryDirectory[str]:
    """Making it takes seconds; a plan and its run ask for it several times."""
    folder = tempfile.TemporaryDirectory(prefix="compressor-")
    write_gguf_tokenizer(path, Path(folder.name))
    return folder


def write_gguf_tokenizer(path: Path, directory: Path) -> None:
    """The tokenizer of a GGUF file, in Hugging Face's files. What lies beside the file is not looked at."""
    from transformers import AutoTokenizer

    from compressor.checkpoints.reach import offline
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
