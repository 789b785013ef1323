"""Static int8: convolutions whose weights *and* activations are int8, as pairs of QuantizeLinear and DequantizeLinear.

onnxruntime fuses DequantizeLinear → Conv → QuantizeLinear to QLinearConv, Add and Concat alike. Integer arithmetic
with ranges known beforehand: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, https://arxiv.org/abs/1712.05877.

    x̂ = s_x·(q_x − z_x)      uint8, one scale and zero point per tensor, from `ranges`
    ŵ = s_w·q_w              int8, a scale per output channel: the stored codes, or signs, read as they are
    b̂ = s_x·s_w·q_b          int32
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compressor.core.encoding import Encoding, Scaled
from compressor.export.int8_operations import Int8Operation, observed
from compressor.export.lowering import Lowering
from compressor.export.ranges import Range

_LARGEST_BIAS = 2.0**30
"""Of a bias in int32: half of what fits, so that the sum of the products fits beside it."""
_SMALLEST_SCALE = 1e-20


class StaticInt8:
    """Rewrites `operations` of the graph that `lowering` writes into; `ranges` are those of `observed(operations)`.

    Without ranges the scales and zero points become inputs of the graph, `scale.0`, `zero.0` and on, in that order, and
    biases stay floats: for trying ranges.
    """

    def __init__(
        self, lowering: Lowering, operations: Sequence[Int8Operation], ranges: Sequence[Range] | None
    ) -> None:  # fmt: skip
        self.lowering, self.builder, self.operations = lowering, lowering.builder, operations
        self._given = {} if ranges is None else dict(zip(observed(operations), ranges, strict=True))
        self._scales: dict[ir.Value, tuple[ir.Value, ir.Value]] = {
            value: self._free(i) if ranges is None else self._fixed(*self._given[value])
            for i, value in enumerate(observed(operations))
        }
        self._int8: dict[ir.Value, ir.Value] = {}

    def rewrite(self) -> None:
        """Replaces the operations, each by one on dequantised values whose output is quantised."""
        for operation in self.operations:
            self._replace(operation)

    def _fixed(self, low: float, high: float) -> tuple[ir.Value, ir.Value]:
        scale, zero = (self.builder.constant(np.asarray(entry)) for entry in quantisation(low, high))
        return scale, zero

    def _free(self, at: int) -> tuple[ir.Value, ir.Value]:
        types = {"scale": ir.DataType.FLOAT, "zero": ir.DataType.UINT8}
        found = [
            ir.Value(name=f"{name}.{at}", type=ir.TensorType(dtype), shape=ir.Shape([]))
            for name, dtype in types.items()
        ]
        self.builder.graph.inputs.extend(found)
        return found[0], found[1]

    def _replace(self, operation: Int8Operation) -> None:
        b, node = self.builder, operation.node
        b.before = node
        inputs = [self._dequantised(value) for value in operation.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if operation.kind == "move":
            moved = operation.inputs[0]
            self._scales[operation.output] = self._scales[moved]
            if moved in self._given:
                self._given[operation.output] = self._given[moved]
        if operation.kind == "conv":
            inputs += self._weight_and_bias(operation)
        if operation.kind == "swish":
            made = b.op("Mul", inputs[0], self._gate(inputs[0], operation))
        else:
            rest = node.inputs[1:] if len(operation.inputs) == 1 and operation.kind != "conv" else ()
            made = b.op(node.op_type, *inputs, *rest, **attributes)
        found = self._through_int8(made, *self._scales[operation.output])
        found.shape, found.type = operation.output.shape, operation.output.type
        operation.output.replace_all_uses_with(found, replace_graph_outputs=True)
        self._int8[operation.output] = found
        for old in reversed(operation.nodes):
            assert old.graph is not None
            old.graph.remove(old, safe=True)

    def _gate(self, x: ir.Value, operation: Int8Operation) -> ir.Value:
        """clip(αx + β, 0, 1): x + β/α, rounded to the range of 0 to 1/α, whose codes are then read as 0 to 1."""
        b, slope, offset = self.builder, operation.slope, operation.offset
        zero = b.constant(np.asarray(np.uint8(0)))
        step = b.constant(np.asarray(np.float32(offset / slope / 255)))
        added = b.op("Add", x, b.op("DequantizeLinear", b.constant(np.asarray(np.uint8(255))), step, zero))
        codes = b.op("QuantizeLinear", added, b.constant(np.asarray(np.float32(1 / slope / 255))), zero)
        return b.op("DequantizeLinear", codes, b.constant(np.asarray(np.float32(1 / 255))), zero)

    def _dequantised(self, value: ir.Value) -> ir.Value:
        """The value as int8 operations read it; other readers of a float value keep the float."""
        if value not in self._int8:
            self._int8[value] = self._through_int8(value, *self._scales[value])
        return self._int8[value]

    def _through_int8(self, value: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        return self.builder.op("DequantizeLinear", self.builder.op("QuantizeLinear", value, scale, zero), scale, zero)

    def _weight_and_bias(self, operation: Int8Operation) -> list[ir.Value]:
        b, weight = self.builder, _tensor(operation.node.inputs[1])
        scale, bias = self._folded(operation, row_scales(self.lowering.tensors[weight].encoding))
        codes = self.lowering.int8_codes(weight)
        if not self._given:
            scales = b.constant(scale.astype(np.float32))
            return [b.op("DequantizeLinear", codes, scales, axis=0), b.constant(bias.astype(np.float32))]
        input_scale = np.float64(quantisation(*self._given[operation.inputs[0]])[0])
        scale = enlarged(scale, bias / input_scale)
        rounded = np.round(bias / (scale * input_scale)).astype(np.int32)
        weight_scale = b.constant(scale.astype(np.float32))
        bias_scale = b.op("Mul", weight_scale, b.constant(float(input_scale)))
        return [
            b.op("DequantizeLinear", codes, weight_scale, axis=0),
            b.op("DequantizeLinear", b.constant(rounded), bias_scale, axis=0),
        ]

    def _folded(self, operation: Int8Operation, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales and biases (out,) after the batch norm: s·a and β + (b − μ)·a, where a = γ / √(σ² + ε).

        A scale per row makes folding exact without a change of the codes.
        """
        own = operation.node.inputs[2] if len(operation.node.inputs) > 2 else None
        bias = np.zeros_like(scale) if own is None else self._vector(own)
        if operation.norm is None:
            return scale, bias
        gamma, beta, mean, variance = (self._vector(value) for value in operation.norm.inputs[1:5])
        factor = gamma / np.sqrt(variance + operation.norm.attributes.get_float("epsilon", 1e-5))
        return scale * factor, beta + (bias - mean) * factor

    def _vector(self, value: ir.Value | None) -> np.ndarray:
        assert value is not None
        if value.const_value is not None:
            return value.const_value.numpy().astype(np.float64).ravel()
        return self.lowering.tensors[_tensor(value)].decode().numpy().astype(np.float64).ravel()


def row_scales(encoding: Encoding) -> np.ndarray:
    """The scale of each output, float64 (out,)."""
    assert isinstance(encoding, Scaled)
    stored = encoding.scales.decode()
    return np.broadcast_to(stored.numpy()[:, 0].astype(np.float64), encoding.shape[0])


def quantisation(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 for a range, which is widened to hold 0: s = (high − low) / 255, z = −low / s.

    A range of nothing but zeros gets the scale 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return scale, np.uint8(np.clip(np.round(-low / scale), 0, 255))


def free_scales(ranges: Sequence[Range]) -> dict[str, np.ndarray]:
    """What a graph whose scales are inputs is fed for these ranges."""
    found = [quantisation(*each) for each in ranges]
    return {f"scale.{i}": np.asarray(scale) for i, (scale, _) in enumerate(found)} | {
        f"zero.{i}": np.asarray(zero) for i, (_, zero) in enumerate(found)
    }


def enlarged(scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Weight scales (out,), large enough that bias / scale fits into int32.

    Channels that a batch norm has all but switched off have scales near zero beside an ordinary bias. Theirs are
    enlarged, with the sign kept; their products stay below 2⁻¹⁵ of the bias for each weight.
    """
    least = np.maximum(np.abs(bias) / _LARGEST_BIAS, _SMALLEST_SCALE)
    return np.where(scale < 0, -1.0, 1.0) * np.maximum(np.abs(scale), least)


def _tensor(value: ir.Value | None) -> str:
    assert value is not None
    return value.metadata_props["tensor"]
