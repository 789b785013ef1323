#!/usr/bin/env python
"""How fast onnxruntime's products are where many tokens are read at once: float32, MatMulNBits, DynamicQuantizeMatMul.

    scripts/bench_products.py

The linears of a block of SmolLM2 and of MiniLM, random weights, one thread; CPU time, medians of seven, the kinds in
turn within one process.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime
from measured import markdown, write_results
from onnx import TensorProto, helper, numpy_helper

BLOCKS = {
    "SmolLM2": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "MiniLM": ((384, 384),) * 4 + ((1536, 384), (384, 1536)),
}
"""(outputs, inputs) of each linear."""
TOKENS = (128, 512)
KINDS = ("float32", "int2, MatMulNBits", "int4, MatMulNBits", "int8, MatMulNBits", "int8, DynamicQuantizeMatMul")
COPIES, REPEATS, BLOCK = 2, 7, 64


def graph(kind: str, shapes: tuple[tuple[int, int], ...]) -> onnx.ModelProto:
    """Every linear of some blocks on an input of its width."""
    generator = np.random.default_rng(0)
    nodes, stored, outputs = [], [], []
    widths = sorted({columns for _, columns in shapes})
    for number, (rows, columns) in enumerate(shapes * COPIES):
        name = f"y{number}"

        def constant(part: str, values: np.ndarray, name: str = name) -> str:
            stored.append(numpy_helper.from_array(values, f"{name}.{part}"))
            return f"{name}.{part}"

        if kind == "float32":
            weight = constant("w", generator.standard_normal((columns, rows)).astype(np.float32))
            nodes.append(helper.make_node("MatMul", [f"x{columns}", weight], [name]))
        elif kind.endswith("DynamicQuantizeMatMul"):
            inputs = [
                f"x{columns}", constant("w", generator.integers(-127, 128, (columns, rows)).astype(np.int8)),
                constant("s", np.full(rows, 0.01, np.float32)),
            ]  # fmt: skip
            nodes.append(helper.make_node("DynamicQuantizeMatMul", inputs, [name], domain="com.microsoft"))
        else:
            bits, blocks = int(kind[3]), columns // BLOCK
            codes = generator.integers(0, 256, (rows, blocks, BLOCK * bits // 8)).astype(np.uint8)
            inputs = [f"x{columns}", constant("w", codes), constant("s", np.full(rows * blocks, 0.01, np.float32))]
            nodes.append(helper.make_node(
                "MatMulNBits", inputs, [name], domain="com.microsoft", K=columns, N=rows, bits=bits, block_size=BLOCK,
                accuracy_level=4,
            ))  # fmt: skip
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", rows]))
    inputs = [helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT, ["n", width]) for width in widths]
    made = helper.make_graph(nodes, "g", inputs, outputs, stored)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """CPU-milliseconds by network, tokens and kind."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    found: dict[str, dict[str, dict[str, float]]] = {}
    for network, shapes in BLOCKS.items():
        sessions = {
            kind: onnxruntime.InferenceSession(
                graph(kind, shapes).SerializeToString(), options, ["CPUExecutionProvider"]
            )
            for kind in KINDS
        }
        for tokens in TOKENS:
            feed = {
                f"x{width}": np.random.default_rng(1).standard_normal((tokens, width)).astype(np.float32)
                for width in {columns for _, columns in shapes}
            }
            taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for repeat in range(REPEATS + 1):
                for kind, session in sessions.items():
                    began = time.process_time()
                    session.run(None, feed)
                    if repeat:
                        taken[kind].append(1e3 * (time.process_time() - began) / COPIES)
            found.setdefault(network, {})[str(tokens)] = {kind: statistics.median(each) for kind, each in taken.items()}
    return found


def products_table(results: dict[str, Any]) -> str:
    """A row per network and number of tokens: how many times as fast as float32."""
    rows = [
        [f"{network}, {tokens} tokens", f"{times['float32']:.1f} ms", *(
            f"{times['float32'] / times[kind]:.2f} ×" for kind in KINDS[1:])]
        for network, by_tokens in results.items()
        for tokens, times in by_tokens.items()
    ]  # fmt: skip
    return markdown(["linears of a block", *KINDS], rows)


def main() -> None:
    results = measure()
    write_results("products", results)
    print(products_table(results))
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
