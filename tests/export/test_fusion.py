"""What is fused computes the same; what only looks like it is left alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compressor.export.fusion import fuse

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>\n'

NORM = """
norm (float[B,L,8] x, float[{weight}] w) => (float[B,L,8] y) {{
  two = Constant<value = float {{2.0}}>() last = Constant<value = int64[1] {{-1}}>()
  small = Constant<value = float {{1e-5}}>()
  square = Pow(x, two) mean = ReduceMean<keepdims = 1>(square, last) shifted = Add(mean, small)
  root = Sqrt(shifted) inverse = Reciprocal(root) normed = Mul(x, inverse) y = Mul(w, normed)
}}"""

ROTATION = """
rotation (float[B,3,L,8] x, float[{rows},L,4] angles, float[{rows},L,4] others) => (float[B,3,L,8] y) {{
  a = Constant<value = int64[1] {{0}}>() b = Constant<value = int64[1] {{4}}>()
  c = Constant<value = int64[1] {{9223372036854775807}}>()
  axis = Constant<value = int64[1] {{3}}>()
  step = Constant<value = int64[1] {{1}}>() one = Constant<value = int64[1] {{1}}>()
  both = Concat<axis = -1>(angles, {other}) cosine = Cos(both) sine = Sin(both)
  cosines = Unsqueeze(cosine, one) sines = Unsqueeze(sine, one)
  first = Slice(x, a, b, axis, step) second = Slice(x, b, c, axis, step) minus = Neg(second)
  turned = Concat<axis = -1>(minus, first) p = Mul(x, cosines) q = Mul(turned, sines) y = Add(p, q)
}}"""

GROUPS = """
groups (float[B,6,L,8] q, float[B,2,5,8] k, float[B,2,5,8] v) => (float[B,6,L,8] y) {{
  two = Constant<value = int64[1] {{{axis}}}>() half = Constant<value = float {{0.5}}>()
  copies = Constant<value = int64[5] {{1, {spread}, 1, 1}}>() heads = Constant<value = int64[4] {{0, 6, 5, 8}}>()
  k5 = Unsqueeze(k, two) kc = Expand(k5, copies) kh = Reshape<allowzero = 0>(kc, heads)
  kt = Transpose<perm = [0, 1, 3, 2]>(kh)
  v5 = Unsqueeze(v, two) vc = Expand(v5, copies) vh = Reshape(vc, heads)
  s = MatMul(q, kt) scaled = Mul(s, half) w = Softmax<axis = -1>(scaled) y = MatMul(w, vh)
}}"""


def graph(text: str) -> ir.Model:
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEAD + text), data_prop=True)
    made = ir.from_proto(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(made)
    return made


def values(model: ir.Model) -> dict[str, np.ndarray]:
    """Random inputs; B is 2, and L 3."""
    rng, sizes = np.random.default_rng(0), {"B": 2, "L": 3}
    return {
        str(value.name): rng.standard_normal([sizes.get(str(n)) or int(str(n)) for n in value.shape or ()]).astype(
            np.float32
        )
        for value in model.graph.inputs
    }


def computed(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    content = ir.to_proto(model).SerializeToString()
    found = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    assert isinstance(found, np.ndarray)
    return found


def fused(text: str) -> Counter[str]:
    """The operators afterwards, by which the graph computes the same."""
    model = graph(text)
    inputs = values(model)
    before = computed(model, inputs)
    fuse(model, "default")
    np.testing.assert_allclose(computed(model, inputs), before, rtol=1e-5, atol=1e-6)
    return Counter(node.op_type for node in model.graph)


def test_a_norm_is_one_operator():
    assert fused(NORM.format(weight="8")) == {"SimplifiedLayerNormalization": 1}


@pytest.mark.parametrize("weight", ["B,L,8", "1", "B,1,8"])
def test_what_is_no_weight_of_each_channel_makes_no_norm(weight):
    assert fused(NORM.format(weight=weight))["Reciprocal"] == 1


@pytest.mark.parametrize("rows", ["B", "1"])
def test_a_rotation_by_equal_halves_is_one_operator(rows):
    found = fused(ROTATION.format(other="angles", rows=rows))
    assert found["RotaryEmbedding"] == 1
    assert found["Neg"] == found["Add"] == 0


def test_a_rotation_whose_halves_differ_is_left():
    assert fused(ROTATION.format(other="others", rows="B"))["RotaryEmbedding"] == 0


def test_keys_and_values_that_heads_share_are_not_copied():
    found = fused(GROUPS.format(axis=2, spread="1, 3"))
    assert found["Expand"] == 0
    assert found["MatMul"] == 2


def test_heads_that_are_copied_in_another_order_are_left():
    assert fused(GROUPS.format(axis=1, spread="3, 1"))["Expand"] == 2


def test_standard_mode_has_standard_operators():
    model = graph(NORM.format(weight="8"))
    fuse(model, "standard")
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
