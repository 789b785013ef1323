"""Forms that onnxruntime runs 40 to 180 times too slowly without a warning: found in the graph that it really runs.

The model is loaded, onnxruntime's optimised graph is saved to a temporary file, and its operators are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from compressor.runtime.sessions import optimised_graph

_KERNELS = ("MatMulNBits", "MatMul", "Gemm", "FusedMatMul", "Conv")
_WEIGHT = 1  # position of the weights among a kernel's inputs
_OPERANDS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
"""Inputs of low-bit kernels that are stored in every graph that folds: weights, scales, zero points."""
_FAST_INT2_BLOCKS = (32, 64, 128)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def slow_paths(model_path: Path, exact: bool = False) -> list[str]:
    """What is slow in a model, a sentence each; empty where all is well. `exact` allows float32 activations."""
    with tempfile.TemporaryDirectory() as scratch:
        graph = ir.load(optimised_graph(model_path, Path(scratch))).graph
        found = [reason for node in graph for reason in _reasons(node, exact)]
    return found


def _reasons(node: ir.Node, exact: bool) -> Iterator[str]:
    if node.op_type == "MatMulNBits":
        yield from _kernel_reasons(node, exact)
    for value in _made_operands(node):
        yield f"{node.name}: its {value.name} is made at every run by {_maker(value)}; that should fold"
    if node.op_type in _KERNELS and node.op_type not in _OPERANDS:
        unfolded = _unfolded(node)
        if unfolded:
            yield f"{node.name}: its weights are unpacked at every run by {' → '.join(unfolded)}; that should fold"


def _kernel_reasons(node: ir.Node, exact: bool) -> Iterator[str]:
    bits, block = _integer(node.attributes, "bits", 4), _integer(node.attributes, "block_size", 32)
    level = _integer(node.attributes, "accuracy_level", 0)
    if bits in (2, 8) and level != 4 and not exact:
        yield f"{node.name}: MatMulNBits of {bits} bits with accuracy_level {level}; only 4 is fast"
    if bits == 2 and block not in _FAST_INT2_BLOCKS:
        yield f"{node.name}: MatMulNBits of 2 bits with block_size {block}; only 32, 64 and 128 are fast"
    zeros = node.inputs[3] if len(node.inputs) > 3 else None
    if zeros is not None and zeros.dtype in _FLOATS:
        yield f"{node.name}: MatMulNBits with float zero points; only packed uint8 ones are fast"


def _made_operands(node: ir.Node) -> list[ir.Value]:
    """Operands of a low-bit kernel that nodes make, of constants or behind a gate that did not open."""
    operands = [node.inputs[at] for at in _OPERANDS.get(node.op_type, ()) if at < len(node.inputs)]
    return [value for value in operands if value is not None and value.producer() is not None]


def _maker(value: ir.Value) -> str:
    node = value.producer()
    assert node is not None
    return node.op_type


def _unfolded(node: ir.Node) -> list[str]:
    """Operators between an initialiser and the weights of `node`, nearest the initialiser first; empty if none."""
    value = node.inputs[_WEIGHT] if len(node.inputs) > _WEIGHT else None
    return _constant_chain(value.producer()) if value is not None else []


def _constant_chain(node: ir.Node | None) -> list[str]:
    if node is None:
        return []
    above: list[str] = []
    for value in node.inputs:
        if value is None or value.const_value is not None:
            continue
        producer = value.producer()
        chain = _constant_chain(producer)
        if not chain:
            return []
        above = chain if len(chain) > len(above) else above
    return [*above, node.op_type]


def _integer(attributes: Mapping[str, ir.Attr], name: str, default: int) -> int:
    return attributes[name].as_int() if name in attributes else default
