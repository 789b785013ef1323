"""What a tensor is, from its name and shape: without the network, so that a plan needs only headers."""

from __future__ import annotations

import math
import re
from typing import Any

from compressor.core.passes import Role

_TABLE = re.compile(r"(^|\.)(embed_(tokens|positions|in|out)|embed|\w*embeddings?|wte|wpe|lm_head)(\.weight)?$")
_POSITIONS = re.compile(r"wpe|position|token_type")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def role_of(name: str, shape: tuple[int, ...], config: dict[str, Any] | None = None) -> Role:
    """A linear layer, an embedding (or the output table, its like), a convolution, or something else."""
    if len(shape) == 2:
        vocabulary = (config or {}).get("vocab_size")
        return "embedding" if _TABLE.search(name) or shape[0] == vocabulary else "linear"
    if len(shape) in (3, 4, 5) and name.endswith(".weight"):
        return "conv"
    return "other"


def is_token_table(name: str) -> bool:
    """Whether a table, by its name, has a row per token: an embedding of tokens, or an output table."""
    return _POSITIONS.search(name) is None


def is_transposed(name: str, config: dict[str, Any] | None = None) -> bool:
    """Whether the tensor is stored (inputs, outputs), as the Conv1D of GPT-2."""
    return (config or {}).get("model_type") in _CONV1D_TYPES and bool(_CONV1D.search(name))


def matrix_shape(name: str, shape: tuple[int, ...], config: dict[str, Any] | None = None) -> tuple[int, int]:
    """(rows, columns) of the matrix that stands for a tensor; outputs are rows."""
    first = shape[0] if shape else 1
    matrix = (first, math.prod(shape[1:]))
    return (matrix[1], matrix[0]) if is_transposed(name, config) else matrix


def block_of(name: str, config: dict[str, Any] | None = None) -> str:
    """The repeated block that a tensor belongs to: `model.layers.3`; empty outside of blocks.

    An encoder and a decoder, where a config says that there are both, are one block: `graph.blocks.block_names`.
    """
    match = None if (config or {}).get("is_encoder_decoder") else _BLOCK.match(name)
    return match.group(1) if match else ""


def folded(name: str) -> str:
    """The name with a star for each number of a block in it, which alike tensors of all blocks share.

    Blocks of an ONNX graph are called `layer_0`, and not `layer.0`: only what has more below it is one.
    """
    return re.sub(r"(?<=\.)\d+(?=\.)|(?<=_)\d+(?=\.[^.]+\.)", "*", name)
