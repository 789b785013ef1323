"""The ONNX graph of a Llama-like decoder, written node by node from its config: no tracing, seconds instead of minutes.

Inputs   input_ids, attention_mask (batch, past + length), past_key_values.{i}.key and .value
         (batch, kv heads, past, head dim)
         num_logits_to_keep, which need not be fed: how many positions get logits, the last ones; 0, its default, is all
Outputs  logits for these positions, present.{i}.key and .value

Batch and lengths are free. The names are those that onnxruntime-genai and optimum use. In the default and compat modes
the sequences of a batch are padded on the right (a property of GroupQueryAttention), and past and present may be one
buffer, longer than what it holds, which is then written in place: the graph's metadata says so (`core.artifact.CACHE`).
In standard mode padding is on either side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from compressor.core.artifact import CACHE, IN_PLACE, KEPT
from compressor.core.errors import ExportError
from compressor.core.tensors import EncodedTensors
from compressor.export.attention import Attention, GroupQueryAttention, StandardAttention
from compressor.export.builder import GraphBuilder, forget_types
from compressor.export.decoder_config import DecoderConfig, decoder_refusal
from compressor.export.lowering import IR_VERSIONS, OPSETS, Lowering, Mode
from compressor.export.staging import staged

MODEL_FILE = "model.onnx"
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def export_decoder(
    config: dict[str, Any], tensors: EncodedTensors, out_dir: Path,
    mode: Mode = "default", exact: bool = False, context: int | None = None, file: str = MODEL_FILE,
) -> Path:  # fmt: skip
    """Writes the graph `file` over `out_dir`/model.safetensors; returns its path.

    Raises:
        ExportError: the config is of a network that this file does not know.
    """
    reason = decoder_refusal(config)
    if reason:
        raise ExportError(f"{out_dir / MODEL_FILE}: {reason}")
    graph = ir.Graph([], [], nodes=[], name="decoder", opset_imports={"": OPSETS[mode], "com.microsoft": 1})
    lowering = Lowering(tensors, GraphBuilder(graph), mode, exact, out_dir)
    _Decoder(DecoderConfig.of(config, context), lowering).build()
    lowering.close()
    model = ir.Model(graph, ir_version=IR_VERSIONS[mode], producer_name="compressor")
    if mode != "standard":
        model.metadata_props[CACHE] = IN_PLACE
    RemoveUnusedNodesPass()(model)  # weights that one product takes together are initialisers of their own no more
    staged(model, mode)
    forget_types(graph)
    if mode == "standard":
        del graph.opset_imports["com.microsoft"]
    ir.save(model, out_dir / file)
    return out_dir / file


class _Decoder:
    def __init__(self, config: DecoderConfig, lowering: Lowering) -> None:
        self.config, self.lowering, self.b = config, lowering, lowering.builder
        self.standard = lowering.mode == "standard"

    def build(self) -> None:
        """Embedding, blocks, norm, head."""
        config = self.config
        ids = self._input("input_ids", INT64, "batch_size", "sequence_length")
        mask = self._input("attention_mask", INT64, "batch_size", "total_sequence_length")
        pasts = [self._past(layer) for layer in range(config.layers)]
        attention = (StandardAttention if self.standard else GroupQueryAttention)(self.b, config, ids, mask)
        embedded = self.lowering.embedding(ids, "model.embed_tokens.weight", tied=self._head_is_tied())
        stream, presents = self._scaled(embedded, config.embedding_scale), []
        before, after, between, last = config.norms
        normed = self._first_norm(stream, f"model.layers.0.{before}.weight") if before else stream
        for layer in range(config.layers):
            stem = f"model.layers.{layer}"
            attended, *present = self._attention(attention, layer, normed, pasts[layer])
            presents += present
            attended = self._normed(attended, stem, after)
            normed, stream = self._add_and_norm(stream, attended, between and f"{stem}.{between}.weight")
            following = before and f"model.layers.{layer + 1}.{before}.weight"
            following = following if layer + 1 < config.layers else "model.norm.weight"
            normed, stream = self._add_and_norm(stream, self._normed(self._mlp(stem, normed), stem, last), following)
        head = "model.embed_tokens.weight" if self._head_is_tied() else "lm_head.weight"
        normed = self._scaled(self._kept(normed), config.logit_scale)
        capped = config.logit_cap is not None
        logits = self.lowering.matmul(normed, head, self._bias("lm_head"), output=None if capped else "logits")
        if config.logit_cap is not None:
            cap = self.b.constant(config.logit_cap)
            logits = self.b.op("Mul", self.b.op("Tanh", self.b.op("Div", logits, cap)), cap, name="logits")
        self._output(logits, "batch_size", "kept", config.vocabulary)
        for present in presents:
            self._output(present, "batch_size", config.kv_heads, "total_sequence_length", config.head_dim)

    def _kept(self, x: ir.Value) -> ir.Value:
        """The last positions of x (batch, length, hidden), as many as the optional input says; all where it is 0."""
        b = self.b
        n = b.initializer(ir.Tensor(np.array(0, np.int64), name=KEPT))
        b.graph.inputs.append(n)
        start = b.op("Unsqueeze", b.op("Neg", n), b.integers(0))
        return b.op("Slice", x, start, b.integers(np.iinfo(np.int64).max), b.integers(1))

    def _scaled(self, x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1.0 else self.b.op("Mul", x, self.b.constant(factor))

    def _normed(self, x: ir.Value, stem: str, norm: str | None) -> ir.Value:
        return self._first_norm(x, f"{stem}.{norm}.weight") if norm else x

    def _norm_weight(self, name: str) -> ir.Value:
        weight = self.lowering.constant(name)
        return self.b.op("Add", weight, self.b.constant(1.0)) if self.config.around_one else weight

    def _head_is_tied(self) -> bool:
        tensors = self.lowering.tensors
        return self.config.tied or tensors.tied.get("lm_head.weight") == "model.embed_tokens.weight"

    def _input(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.b.graph.inputs.append(value)
        return value

    def _output(self, value: ir.Value, *shape: int | str) -> None:
        value.type, value.shape = ir.TensorType(FLOAT), ir.Shape(shape)
        self.b.graph.outputs.append(value)

    def _past(self, layer: int) -> tuple[ir.Value, ir.Value]:
        shape = ("batch_size", self.config.kv_heads, "past_sequence_length", self.config.head_dim)
        key, value = (self._input(f"past_key_values.{layer}.{part}", FLOAT, *shape) for part in ("key", "value"))
        return key, value

    def _bias(self, module: str) -> ir.Value | None:
        name = f"{module}.bias"
        known = name in self.lowering.tensors or name in self.lowering.tensors.tied
        return self.lowering.constant(name) if known else None

    def _linear(self, x: ir.Value, module: str) -> ir.Value:
        return self.lowering.matmul(x, f"{module}.weight", self._bias(module))

    def _attention(
        self, attention: Attention, layer: int, x: ir.Value, past: tuple[ir.Value, ir.Value]
    ) -> list[ir.Value]:
        stem = f"model.layers.{layer}.self_attn"
        found = attention.attend(layer, self._projections(stem, x), past)
        for value, part in zip(found[1:], ("key", "value"), strict=True):
            value.name = f"present.{layer}.{part}"
        return [self._linear(found[0], f"{stem}.o_proj"), *found[1:]]

    def _projections(self, stem: str, x: ir.Value) -> list[ir.Value]:
        if self.config.fused:
            packed, heads = self._linear(x, f"{stem}.qkv_proj"), (self.config.heads, *2 * [self.config.kv_heads])
            sizes = self.b.integers(*(n * self.config.head_dim for n in heads))
            return self.b.ops("Split", packed, sizes, outputs=3, axis=-1) if self.standard else [packed]
        modules = [f"{stem}.{part}_proj" for part in "qkv"]
        biases = [self._bias(module) for module in modules]
        names = [f"{module}.weight" for module in modules]
        norms = self.config.head_norms or self.config.width_norms
        if not norms and not any(biases) and self.lowering.joins(names):
            return [self.lowering.joined_matmul(x, names)]
        query, key, value = (self.lowering.matmul(x, *pair) for pair in zip(names, biases, strict=True))
        if self.config.head_norms:
            query = self._head_norm(query, self.config.heads, f"{stem}.q_norm.weight")
            key = self._head_norm(key, self.config.kv_heads, f"{stem}.k_norm.weight")
        if self.config.width_norms:
            query = self._first_norm(query, f"{stem}.q_norm.weight")
            key = self._first_norm(key, f"{stem}.k_norm.weight")
        return [query, key, value]

    def _head_norm(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        split = self.b.reshape(x, 0, 0, heads, self.config.head_dim)
        return self.b.reshape(self._first_norm(split, name), 0, 0, heads * self.config.head_dim)

    def _mlp(self, stem: str, x: ir.Value) -> ir.Value:
        modules = [f"{stem}.mlp.{part}_proj" for part in ("gate", "up")]
        names = [f"{module}.weight" for module in modules]
        fused = f"{stem}.mlp.gate_up_proj"
        if self.config.fused or (self._bias(modules[0]) is None and self.lowering.joins(names)):
            both = self._linear(x, fused) if self.config.fused else self.lowering.joined_matmul(x, names)
            gate, up = self.b.ops("Split", both, outputs=2, axis=-1, num_outputs=2)
        else:
            gate, up = (self._linear(x, module) for module in modules)
        if self.config.activation == "gelu":
            active = self.b.op("Gelu", gate, approximate="tanh")
        else:
            active = self.b.op("Mul", gate, self.b.op("Sigmoid", gate))
        return self._linear(self.b.op("Mul", active, up), f"{stem}.mlp.down_proj")

    def _first_norm(self, x: ir.Value, name: str) -> ir.Value:
        operator = "RMSNormalization" if self.standard else "SimplifiedLayerNormalization"
        return self.b.op(operator, x, self._norm_weight(name), axis=-1, epsilon=self.config.epsilon, stash_type=1)

    def _add_and_norm(self, stream: ir.Value, update: ir.Value, name: str | None) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum); without a name the sum twice."""
        update = self._scaled(update, self.config.residual_scale)
        if self.standard or name is None:
            total = self.b.op("Add", stream, update)
            return total if name is None else self._first_norm(total, name), total
        outputs = self.b.ops(
            "SkipSimplifiedLayerNormalization", stream, update, self._norm_weight(name), outputs=4,
            domain="com.microsoft", epsilon=self.config.epsilon,
        )  # fmt: skip
        outputs[1].name = outputs[2].name = ""
        return outputs[0], outputs[3]
