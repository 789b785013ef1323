"""The graph of a few equal blocks, repeated, is that of all of them; where they are not equal nothing is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from compressor.core.tensors import EncodedTensors
from compressor.export.builder import GraphBuilder
from compressor.export.repeating import Ends, repeat
from compressor.graph.periods import Period

WIDTH, FLOAT = 3, ir.DataType.FLOAT
NAMES = tuple(f"blocks.{i}" for i in range(8))
WEIGHTS = {
    **{f"{name}.weight": np.random.default_rng(i).normal(size=(WIDTH, WIDTH)) for i, name in enumerate(NAMES)},
    "embed": np.random.default_rng(50).normal(size=(1, WIDTH)),
    "head": np.random.default_rng(51).normal(size=(WIDTH, 2)),
}


class Names(EncodedTensors):
    """Of tensors only the names count."""

    def __contains__(self, name: object) -> bool:
        return name in WEIGHTS


def written(n: int, counted: bool = False, skips: bool = False, looped: int = 0) -> ir.Graph:
    """x + embed, then `n` blocks, then the head: each block keeps x @ weight + past, and adds tanh of it to x.

    Args:
        counted: A constant of each block is another.
        skips: The head sees what the first of two periods gave.
        looped: What is kept is added, too, summed row by row, in a loop; times a number that counts blocks where 2.
    """
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["n", WIDTH]))
    pasts = [ir.Value(name=f"past.{i}", type=ir.TensorType(FLOAT), shape=ir.Shape(["n", WIDTH])) for i in range(n)]
    graph = ir.Graph([x, *pasts], [], nodes=[], opset_imports={"": 21}, name="blocks")
    b = GraphBuilder(graph)

    def weight(name: str) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(list(WEIGHTS[name].shape)))
        value.metadata_props["tensor"] = name
        graph.inputs.append(value)
        return value

    hidden, kept = b.op("Add", x, weight("embed")), []
    seen = [hidden]
    for i in range(n):
        kept.append(b.op("Add", b.op("MatMul", hidden, weight(f"blocks.{i}.weight")), pasts[i], name=f"present.{i}"))
        scale = b.constant(1.5 + (i if counted else i % 2))
        if looped:
            hidden = b.op("Add", hidden, summed(b, kept[-1], b.constant(0.5 + (i if looped == 2 else 0)), i))
        hidden = b.op("Add", hidden, b.op("Mul", b.op("Tanh", kept[-1]), scale))
        seen.append(hidden)
    head = weight("head")
    hidden = b.op("Add", hidden, seen[4]) if skips else hidden
    graph.outputs.extend([b.op("MatMul", hidden, head, name="y"), *kept])
    for value in graph.outputs:
        value.dtype = FLOAT
    return graph


def summed(b: GraphBuilder, rows: ir.Value, factor: ir.Value, i: int) -> ir.Value:
    """The sum of each row and all before it, times a factor from outside of the loop."""
    row, total = (
        ir.Value(name=f"{name}.{i}", type=ir.TensorType(FLOAT), shape=ir.Shape([WIDTH])) for name in ("row", "total")
    )
    add = ir.node("Add", [row, total], name=f"add.{i}")
    scaled = ir.node("Mul", [add.outputs[0], factor], name=f"scaled.{i}")
    body = ir.Graph([total, row], [add.outputs[0], scaled.outputs[0]], nodes=[add, scaled], name=f"body.{i}")
    for value, name in zip(body.outputs, (f"next.{i}", f"sum.{i}"), strict=True):
        value.name, value.dtype, value.shape = name, FLOAT, ir.Shape([WIDTH])
    scan = ir.node(
        "Scan", [b.constant(np.zeros(WIDTH, np.float32)), rows], {"body": body, "num_scan_inputs": 1},
        num_outputs=2, name=f"scan.{i}",
    )  # fmt: skip
    b.graph.append(scan)
    for value, name in zip(scan.outputs, ("last", "sums"), strict=True):
        value.name, value.dtype = f"{name}.{i}", FLOAT
    return scan.outputs[1]


def computed(graph: ir.Graph, path: Path) -> list[np.ndarray]:
    ir.save(ir.Model(graph, ir_version=10), path)
    session = onnxruntime.InferenceSession(path)
    given = {value.name: value.metadata_props.get("tensor") for value in graph.inputs}
    pasts = iter(np.random.default_rng(9).normal(size=(len(NAMES), 4, WIDTH)).astype(np.float32))
    x = np.random.default_rng(8).normal(size=(4, WIDTH)).astype(np.float32)
    feed = {name: WEIGHTS[of].astype(np.float32) for name, of in given.items() if of}
    feed |= {str(name): x if name == "x" else next(pasts) for name, of in given.items() if not of}
    return session.run(None, feed)


@pytest.mark.parametrize("looped", [0, 1])
def test_repeated_blocks_compute_what_all_of_them_compute(tmp_path, looped):
    graph, whole = written(6, looped=looped), written(8, looped=looped)
    assert repeat(graph, Period(NAMES, 2, 2), Names([]), Ends(1, 1, 1))
    for found, expected in zip(computed(graph, tmp_path / "a"), computed(whole, tmp_path / "b"), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("how", [{"counted": True}, {"skips": True}, {"looped": 2}])
def test_blocks_that_differ_or_are_seen_later_are_not_repeated(how):
    graph = written(6, **how)
    before = len(list(graph))
    assert not repeat(graph, Period(NAMES, 2, 2), Names([]), Ends(1, 1, 1))
    assert (len(list(graph)), len(graph.outputs)) == (before, 7)


def test_a_weight_that_is_not_stored_is_not_repeated(monkeypatch):
    monkeypatch.delitem(WEIGHTS, "blocks.7.weight")
    assert not repeat(written(6), Period(NAMES, 2, 2), Names([]), Ends(1, 1, 1))
