"""Ifs whose branch is known before anything runs are that branch; of others the refusal says which input decides."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from compressor.checkpoints import open_checkpoint
from compressor.core.errors import CheckpointError
from compressor.onnx.file import OnnxSource

TWO_IN_ONE = """
<ir_version: 10, opset_import: ["" : 18]>
both (float[B, 32] x, int64 rate) => (float[B, 16] y, float[B, 16] z)
{{
  wanted = Constant<value = int64 {{16}}>()
  is_so = {condition}
  y, z = If (is_so) <
    then_branch = high () => (float[B, 16] a, float[B, 16] c) {{
      product = MatMul(x, high_table)
      rank = Shape(x)
      axes = Size(rank)
      two = Constant<value = int64 {{2}}>()
      flat = Equal(axes, two)
      inner = If (flat) <
        then_branch = as_it_is () => (float[B, 16] e) {{ e = Relu(product) }},
        else_branch = turned () => (float[B, 16] f) {{ f = Neg(product) }}
      >
      a = Add(inner, high_bias)
      c = Identity(inner)
    }},
    else_branch = low () => (float[B, 16] b, float[B, 16] d) {{
      half = Constant<value_float = 0.5>()
      product = MatMul(x, low_table)
      b = Mul(product, half)
      d = Relu(b)
    }}
  >
}}
"""


def two_in_one(condition: str, fixed: int | None = None) -> onnx.ModelProto:
    """A graph of two branches; its rate an initialiser where it is `fixed`."""
    model = parser.parse_model(TWO_IN_ONE.format(condition=condition))
    generator = np.random.default_rng(0)
    for name, shape in (("high_table", (32, 16)), ("low_table", (32, 16)), ("high_bias", (16,))):
        array = generator.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    if fixed is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(fixed), "rate"))
        del model.graph.input[1]
    return model


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


@pytest.mark.parametrize(("fixed", "table"), [(16, "high_table"), (8, "low_table")])
def test_an_if_on_constants_is_the_branch_that_always_runs(tmp_path, fixed, table):
    path = saved(tmp_path, two_in_one("Equal(rate, wanted)", fixed))
    source = open_checkpoint(path).source
    assert isinstance(source, OnnxSource)
    assert [layer.path for layer in source.weights.layers] == [table]
    assert not [node for node in source.model.graph if node.op_type == "If"]
    settled = tmp_path / "settled.onnx"
    ir.save(source.model, settled)
    onnx.checker.check_model(onnx.load(settled))
    feed = {"x": np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)}
    found, wanted = (onnxruntime.InferenceSession(each).run(None, feed) for each in (settled, path))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_sizes_that_an_input_declares_settle_an_if_and_open_ones_do_not(tmp_path):
    last = "Shape(x)\n  at = Constant<value = int64 {{{0}}}>()\n  size = Gather(sizes, at)\n  is_so = Equal(size, of)"
    of = "  of = Constant<value = int64 {{32}}>()"

    def graph(axis: int) -> onnx.ModelProto:
        text = TWO_IN_ONE.replace("  is_so = {condition}", f"{of}\n  sizes = {last.format(axis)}")
        return parser.parse_model(text.replace("{{", "{").replace("}}", "}"))

    for axis, n_left in ((1, 0), (-1, 0), (0, 1)):
        model, whole = graph(axis), two_in_one("Equal(rate, wanted)")
        model.graph.initializer.extend(whole.graph.initializer)
        path = saved(tmp_path, model)
        if n_left:
            with pytest.raises(CheckpointError, match="'x' says which branch runs"):
                open_checkpoint(path)
        else:
            assert [layer.path for layer in open_checkpoint(path).source.weights.layers] == ["high_table"]


def test_layers_in_branches_that_an_input_chooses_are_refused_with_the_input_and_what_to_do(tmp_path):
    path = saved(tmp_path, two_in_one("Equal(rate, wanted)"))
    with pytest.raises(CheckpointError, match=r"the input 'rate' says which branch runs.*docs/onnx\.md"):
        open_checkpoint(path)


def test_the_documents_lines_fix_an_input(tmp_path, monkeypatch):
    """As they stand in docs/onnx.md, with this graph's names."""
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    lines = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    onnx.save(two_in_one("Equal(rate, wanted)"), "silero_vad.onnx")
    exec(lines.replace('"sr"', '"rate"').replace("16000", "16"), {})
    assert [layer.path for layer in open_checkpoint(tmp_path / "silero_16k.onnx").source.weights.layers] == [
        "high_table"
    ]


def test_a_condition_that_is_computed_in_a_thousand_million_ways_is_gone_through_once(tmp_path):
    """Every value is read twice by the next one."""
    model = two_in_one("Equal(rate, wanted)")
    last = "rate"
    for i in range(30):
        model.graph.node.insert(i, onnx.helper.make_node("Add", [last, last], [f"doubled_{i}"]))
        last = f"doubled_{i}"
    (equal,) = [node for node in model.graph.node if node.op_type == "Equal"]
    equal.input[0] = last
    began = time.process_time()
    with pytest.raises(CheckpointError, match="'rate' says which branch runs"):
        open_checkpoint(saved(tmp_path, model))
    assert time.process_time() - began < 3
