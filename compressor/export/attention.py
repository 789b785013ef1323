"""Attention with rotary positions and a key-value cache, in onnxruntime's own operators or in ai.onnx alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import onnx_ir as ir

from compressor.export.builder import GraphBuilder
from compressor.export.decoder_config import DecoderConfig


class Attention(ABC):
    """What is shared by all layers, made once: positions, mask, the cosine and sine tables of each layer.

    The tables are computed by nodes that fold at load, so that they cost the file nothing.
    """

    def __init__(self, b: GraphBuilder, config: DecoderConfig, ids: ir.Value, mask: ir.Value) -> None:
        self.b, self.config = b, config
        places = b.op("Range", *(b.constant(np.array(n, np.float32)) for n in (0, config.context, 1)))
        known: dict[tuple[float, ...], tuple[ir.Value, ir.Value]] = {}
        for frequencies in config.inverse_frequencies:
            if frequencies not in known:
                row = b.constant(np.array(frequencies, np.float32)[None, :])
                angles = b.op("Mul", b.op("Unsqueeze", places, b.integers(1)), row)
                known[frequencies] = b.op("Cos", angles), b.op("Sin", angles)
        self.tables = [known[frequencies] for frequencies in config.inverse_frequencies]
        self._prepare(ids, mask)

    @abstractmethod
    def _prepare(self, ids: ir.Value, mask: ir.Value) -> None:
        """Makes what the layers need of the inputs."""

    @abstractmethod
    def attend(self, layer: int, qkv: list[ir.Value], past: tuple[ir.Value, ir.Value]) -> list[ir.Value]:
        """(attended (batch, length, heads · head_dim), present key, present value).

        `qkv` are projections (batch, length, …): three, or one where they are packed.
        """


class GroupQueryAttention(Attention):
    """com.microsoft::GroupQueryAttention. Shorter sequences of a batch are padded on the right."""

    def _prepare(self, ids: ir.Value, mask: ir.Value) -> None:
        b = self.b
        lengths = b.op("ReduceSum", mask, b.integers(1), keepdims=0)
        self._lengths = b.cast(b.op("Sub", lengths, b.integers(1)), ir.DataType.INT32)
        total = b.op("Gather", b.op("Shape", mask), b.constant(np.array(1, np.int64)), axis=0)
        self._total = b.cast(total, ir.DataType.INT32)

    def attend(self, layer: int, qkv: list[ir.Value], past: tuple[ir.Value, ir.Value]) -> list[ir.Value]:
        query, key, value = qkv if len(qkv) == 3 else (qkv[0], None, None)
        rotated = self.config.rotated[layer]
        tables = self.tables[layer] if rotated else ()
        cap = {"softcap": self.config.attention_cap} if self.config.attention_cap else {}
        return self.b.ops(
            "GroupQueryAttention", query, key, value, *past, self._lengths, self._total, *tables,
            outputs=3, domain="com.microsoft", num_heads=self.config.heads, kv_num_heads=self.config.kv_heads,
            do_rotary=int(rotated), rotary_interleaved=0, scale=self.config.attention_scale,
            local_window_size=self.config.windows[layer], name=f"layers.{layer}.attention", **cap,
        )  # fmt: skip


class StandardAttention(Attention):
    """Primitive operators and RotaryEmbedding (opset 23). Padding may stand on either side.

    Not the Attention operator: from opset 25 on onnxruntime 1.32 expands it, at half the speed.
    """

    def _prepare(self, ids: ir.Value, mask: ir.Value) -> None:
        b, config = self.b, self.config
        zero, one = (b.constant(np.array(n, np.int64)) for n in (0, 1))
        new = b.op("Shape", ids, start=1, end=2)
        total = b.op("Shape", mask, start=1, end=2)
        past = b.op("Sub", total, new)
        counted = b.op("Sub", b.op("CumSum", mask, one), b.integers(1))
        self._positions = b.op("Slice", b.op("Max", counted, b.integers(0)), past, total, b.integers(1))
        keys = b.op("Range", zero, b.op("Squeeze", total), one)
        queries = b.op("Unsqueeze", b.op("Range", b.op("Squeeze", past), b.op("Squeeze", total), one), b.integers(1))
        real = b.op("Unsqueeze", b.cast(mask, ir.DataType.BOOL), b.integers(1, 2))
        seen = b.op("And", real, b.op("GreaterOrEqual", queries, keys))
        self._penalties = {-1: self._penalty(seen)}
        for window in sorted(set(config.windows) - {-1}):
            near = b.op("Less", b.op("Sub", queries, keys), b.integers(window))
            self._penalties[window] = self._penalty(b.op("And", seen, near))
        self._by_head = b.op("Concat", b.integers(0, config.heads), new, total, axis=0)
        self._by_group = b.op("Concat", b.integers(0, config.kv_heads, -1), total, axis=0)

    def attend(self, layer: int, qkv: list[ir.Value], past: tuple[ir.Value, ir.Value]) -> list[ir.Value]:
        b, config, dim = self.b, self.config, self.config.head_dim
        query, key, value = qkv
        query = self._heads(self._rotated(layer, query, config.heads), config.heads)
        query = b.op("Mul", b.reshape(query, 0, config.kv_heads, -1, dim), b.constant(config.attention_scale))
        new = (self._rotated(layer, key, config.kv_heads), value)
        keys, values = (
            b.op("Concat", old, self._heads(x, config.kv_heads), axis=2) for old, x in zip(past, new, strict=True)
        )
        scores = b.op("MatMul", query, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
        if config.attention_cap:
            cap = b.constant(config.attention_cap)
            scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
        scores = b.op("Add", b.op("Reshape", scores, self._by_head), self._penalties[config.windows[layer]])
        weights = b.op("Reshape", b.op("Softmax", scores, axis=-1), self._by_group)
        mixed = b.reshape(b.op("MatMul", weights, values), 0, config.heads, -1, dim)
        mixed = b.reshape(b.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, config.heads * dim)
        return [mixed, keys, values]

    def _penalty(self, seen: ir.Value) -> ir.Value:
        """0 where a key is seen, else so little that its weight is 0: float32 (batch, 1, length, total)."""
        return self.b.op("Where", seen, self.b.constant(0.0), self.b.constant(-1e30))

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        return self.b.op("Transpose", self.b.reshape(x, 0, 0, heads, self.config.head_dim), perm=[0, 2, 1, 3])

    def _rotated(self, layer: int, x: ir.Value, heads: int) -> ir.Value:
        if not self.config.rotated[layer]:
            return x
        return self.b.op("RotaryEmbedding", x, *self.tables[layer], self._positions, num_heads=heads)
