"""Graphs of a few weights, written by hand: a decoder with a KV cache, and a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

HEADS, SIZE, VOCABULARY = 2, 3, 11
WIDTH = HEADS * SIZE


def decoder_text(heads: int, size: int, vocabulary: int, embed: str, answer: str) -> str:
    """A decoder whose state is the running sum of its values, in ONNX's text form.

    embed    statements from input_ids to `embedded` (B, N, heads · size)
    answer   statements from `state`, of the same shape, to `logits`
    """
    return f"""
<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[B, N] input_ids, int64[B, T] attention_mask,
         float[B, {heads}, P, {size}] "past_key_values.0.key", float[B, {heads}, P, {size}] "past_key_values.0.value")
     => (float[B, N, {vocabulary}] logits, float[B, {heads}, T, {size}] "present.0.key",
         float[B, {heads}, T, {size}] "present.0.value")
<int64[4] split = {{0, 0, {heads}, {size}}}, int64[3] join = {{0, -1, {heads * size}}},
 int64[1] axis = {{2}}, int64 two = {{2}}, int64[1] end = {{9223372036854775807}}>
{{
  {embed}
  rows = Reshape(embedded, split)
  heads = Transpose<perm = [0, 2, 1, 3]>(rows)
  "present.0.key" = Concat<axis = 2>("past_key_values.0.key", heads)
  "present.0.value" = Concat<axis = 2>("past_key_values.0.value", heads)
  summed = CumSum("present.0.value", two)
  n = Shape<start = 1, end = 2>(input_ids)
  minus_n = Neg(n)
  last = Slice(summed, minus_n, end, axis)
  back = Transpose<perm = [0, 2, 1, 3]>(last)
  state = Reshape(back, join)
  {answer}
}}
"""


DECODER = decoder_text(
    HEADS, SIZE, VOCABULARY, "embedded = Gather(table, input_ids)", "logits = MatMul(state, head)"
)  # fmt: skip


def decoder_weights() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    table = generator.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    return table, generator.standard_normal((WIDTH, VOCABULARY)).astype(np.float32)


def decoder_logits(ids: list[int]) -> np.ndarray:
    """What the decoder computes for one sequence: the running sum of its embeddings, times the head."""
    table, head = decoder_weights()
    return np.stack([sum(table[token] for token in ids[: i + 1]) @ head for i in range(len(ids))])


def save_decoder(directory: Path) -> Path:
    model = parser.parse_model(DECODER)
    table, head = decoder_weights()
    model.graph.initializer.extend([numpy_helper.from_array(table, "table"), numpy_helper.from_array(head, "head")])
    directory.mkdir(parents=True, exist_ok=True)
    onnx.checker.check_model(model)
    onnx.save(model, directory / "model.onnx")
    config = {"vocab_size": VOCABULARY, "eos_token_id": None, "num_attention_heads": HEADS, "hidden_size": WIDTH}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def save_classifier(directory: Path) -> tuple[Path, np.ndarray]:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> net (float[B, 4] pixels) => (float[B, 3] scores) '
        "{ scores = MatMul(pixels, weight) }"
    )
    weight = np.random.default_rng(6).standard_normal((4, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(model, directory / "model.onnx")
    return directory, weight
