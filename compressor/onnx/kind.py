"""What kind of network an ONNX graph is, by its inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.checkpoints.architecture import Architecture
from compressor.onnx.file import OnnxSource

if TYPE_CHECKING:
    from torch import nn


def onnx_architecture(source: OnnxSource, has_tokenizer: bool) -> Architecture:
    """The graph as an architecture.

    decoder   input_ids, past_key_values.… → logits
    encoder   input_ids
    module    anything else, and graphs of tokens without a tokenizer beside them: they are given arrays
    """
    inputs = [str(value.name) for value in source.model.graph.inputs]
    outputs = [str(value.name) for value in source.model.graph.outputs]
    family = "encoder" if "input_ids" in inputs and has_tokenizer else "module"
    if family == "encoder" and "logits" in outputs and any(name.startswith("past_key_values.") for name in inputs):
        family = "decoder"
    name = str(source.model.graph.name or "graph")
    return Architecture(f"ONNX {name[:60]}", family, lambda _: _build(source))


def _build(source: OnnxSource, *_: Any) -> nn.Module:
    from compressor.onnx.network import OnnxNetwork

    return OnnxNetwork(source)
