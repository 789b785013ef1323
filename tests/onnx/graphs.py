"""ONNX graphs of a few weights, written by hand: every kind of layer, weights in the file and beside it, decoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from tests import pico

WIDTH, VOCABULARY = 64, 96
HEADS, SIZE, N_SUMMED = 2, 3, 11
"""Of the decoder that sums: its heads, what each holds, and its tokens."""

TOKENS = f"""
<ir_version: 10, opset_import: ["" : 18]>
tokens (int64[B, N] input_ids) => (float[B, N, {WIDTH}] hidden, float[B, N, 8] scores)
{{
  embedded = Gather(table, input_ids)
  normed = LayerNormalization<axis = -1>(embedded, "norm.weight", "norm.bias")
  query = MatMul(normed, "onnx::MatMul_1")
  moved = Add("block.query.bias", query)
  active = Relu(moved)
  flipped = Transpose<perm = [1, 0]>("block.out.weight")
  back = MatMul(active, flipped)
  hidden = Add(back, embedded)
  wide = Constant<value = int64[2] {{-1, {WIDTH}}}>()
  flat = Reshape(hidden, wide)
  classes = Gemm<transB = 1>(flat, "head.weight", "head.bias")
  shape = Constant<value = int64[3] {{0, 0, 8}}>()
  size = Shape<start = 0, end = 2>(input_ids)
  eight = Constant<value = int64[1] {{8}}>()
  whole = Concat<axis = 0>(size, eight)
  scores = Reshape(classes, whole)
}}
"""

IMAGES = """
<ir_version: 8, opset_import: ["" : 17]>
images (float[B, 3, 16, 16] pixels) => (float[B, 10] logits)
{
  first = Conv<pads = [0, 1, 2, 1], strides = [2, 2], kernel_shape = [3, 3]>(pixels, "stem.weight", "stem.bias")
  active = Relu(first)
  deep = Conv<auto_pad = "SAME_LOWER", group = 16, kernel_shape = [4, 4]>(active, "depthwise.weight")
  wide = Conv<auto_pad = "SAME_UPPER", strides = [2, 2], kernel_shape = [3, 3]>(deep, "wide.weight", "wide.bias")
  normed = BatchNormalization(wide, "bn.scale", "bn.bias", "bn.mean", "bn.var")
  pooled = GlobalAveragePool(normed)
  flat = Flatten(pooled)
  logits = Gemm(flat, "fc.w", "fc.b")
}
"""


def arrays(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The initialisers of a graph by name."""
    generator = np.random.default_rng(seed)
    shapes = {
        "tokens": {
            "table": (VOCABULARY, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
            "onnx::MatMul_1": (WIDTH, 2 * WIDTH), "block.query.bias": (2 * WIDTH,),
            "block.out.weight": (WIDTH, 2 * WIDTH), "head.weight": (8, WIDTH), "head.bias": (8,),
        },
        "images": {
            "stem.weight": (16, 3, 3, 3), "stem.bias": (16,), "depthwise.weight": (16, 1, 4, 4),
            "wide.weight": (64, 16, 3, 3), "wide.bias": (64,), "bn.scale": (64,), "bn.bias": (64,), "bn.mean": (64,),
            "bn.var": (64,), "fc.w": (64, 10), "fc.b": (10,),
        },
    }[kind]  # fmt: skip
    found = {name: generator.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:]))) for name, shape in shapes.items()}
    return {name: (1 + np.abs(a) if name == "bn.var" else a).astype(np.float32) for name, a in found.items()}


def graph(kind: str) -> onnx.ModelProto:
    """ "tokens": input_ids → hidden, scores; "images": pixels → logits."""
    model = parser.parse_model(TOKENS if kind == "tokens" else IMAGES)
    for name, array in arrays(kind).items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def tokens(folder: Path) -> Path:
    onnx.save(graph("tokens"), folder / "model.onnx")
    return folder / "model.onnx"


def images(folder: Path) -> Path:
    onnx.save(graph("images"), folder / "images.onnx")
    return folder / "images.onnx"


def external(folder: Path) -> Path:
    """`tokens` with its weights in model.data, beside it."""
    onnx.save(
        graph("tokens"), folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=64
    )
    return folder / "model.onnx"


def images_data(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 16, 16)).astype(np.float32)


def tokens_data(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (n, 12))


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
    4, 16, pico.VOCABULARY, "gathered = Gather(table, input_ids)  embedded = MatMul(gathered, mix)",
    "small = Tanh(state)  logits = MatMul(small, head)",
)  # fmt: skip


def decoder(folder: Path) -> Path:
    """A language model with a KV cache, its tokenizer and config beside it."""
    model, generator = parser.parse_model(DECODER), np.random.default_rng(3)
    for name, shape in (("table", (pico.VOCABULARY, 64)), ("mix", (64, 64)), ("head", (64, pico.VOCABULARY))):
        array = (generator.normal(size=shape) / 8).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, folder / "model.onnx")
    pico.write_tokenizer(folder)
    config = {"vocab_size": pico.VOCABULARY, "eos_token_id": None, "num_attention_heads": 4, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.onnx"


SUMS = decoder_text(
    HEADS, SIZE, N_SUMMED, "embedded = Gather(table, input_ids)", "logits = MatMul(state, head)"
)  # fmt: skip


def decoder_weights() -> tuple[np.ndarray, np.ndarray]:
    """The table and the head of `save_decoder`."""
    generator = np.random.default_rng(5)
    table = generator.standard_normal((N_SUMMED, HEADS * SIZE)).astype(np.float32)
    return table, generator.standard_normal((HEADS * SIZE, N_SUMMED)).astype(np.float32)


def decoder_logits(ids: list[int]) -> np.ndarray:
    """What the decoder computes for one sequence: the running sum of its embeddings, times the head."""
    table, head = decoder_weights()
    return np.stack([sum(table[token] for token in ids[: i + 1]) @ head for i in range(len(ids))])


def save_decoder(directory: Path) -> Path:
    """A decoder whose logits are those of `decoder_logits`, and its config; returns the directory."""
    model = parser.parse_model(SUMS)
    table, head = decoder_weights()
    model.graph.initializer.extend([numpy_helper.from_array(table, "table"), numpy_helper.from_array(head, "head")])
    directory.mkdir(parents=True, exist_ok=True)
    onnx.checker.check_model(model)
    onnx.save(model, directory / "model.onnx")
    config = {"vocab_size": N_SUMMED, "eos_token_id": None, "num_attention_heads": HEADS, "hidden_size": HEADS * SIZE}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def save_classifier(directory: Path) -> tuple[Path, np.ndarray]:
    """A graph of one product, pixels (B, 4) → scores (B, 3); returns the directory and the weight."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> net (float[B, 4] pixels) => (float[B, 3] scores) '
        "{ scores = MatMul(pixels, weight) }"
    )
    weight = np.random.default_rng(6).standard_normal((4, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(model, directory / "model.onnx")
    return directory, weight
