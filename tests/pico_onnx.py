"""ONNX graphs of a few weights, written by hand: every kind of layer, weights in the file and beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from tests import pico
from tests.evaluate.pico_graphs import decoder_text

WIDTH, VOCABULARY = 64, 96

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
