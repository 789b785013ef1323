"""A forward as an ONNX graph by torch.onnx, without the network's weights: they are inputs of the graph that note which
tensor each stands for.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from compressor.checkpoints.skeleton import parameter_names
from compressor.core.errors import CheckpointError, ExportError, first_line
from compressor.core.tensors import EncodedTensors
from compressor.export.builder import GraphBuilder
from compressor.export.fixed_sizes import fixed_size
from compressor.export.recurrences import scanned

PREFIX = "network."
TRACED_OPSET = 21


class Shell(Protocol):
    """A module that calls its `network` with a tuple of inputs, and returns its outputs as one."""

    network: nn.Module

    def eval(self) -> nn.Module: ...


def without_weights(module: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32; its parameters, which may be on meta, are memory that is never touched."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
    network = copy.deepcopy(module, memo).eval()
    for child in network.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else _buffer(buffer)
    return network


def _buffer(buffer: Tensor) -> Tensor:
    if buffer.is_meta:
        return torch.empty(buffer.shape, dtype=buffer.dtype)
    return buffer.float() if buffer.is_floating_point() else buffer


def traced(
    shell: Shell, inputs: dict[str, Tensor], axes: Mapping[str, Mapping[int, str]], path: Path
) -> ir.Model:  # fmt: skip
    """The graph that torch makes of a shell's forward, with these axes free.

    Raises:
        CheckpointError: It can make none, or one for texts like the example alone.
    """
    free = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(axes[name], free) for name in inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad(), _torch_says_nothing(), scanned(shell.network):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                shell.eval(), (tuple(inputs.values()),), dynamic_shapes=(shapes,), dynamo=True, optimize=False,
                opset_version=TRACED_OPSET, verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch's tracer runs somebody else's forward; anything may come out of it
        network, reason = type(shell.network).__name__, first_line(error.__cause__ or error)
        raise CheckpointError(
            f"{path}: torch.onnx cannot trace {network}; {reason}; its forward must be free of Python branches on "
            "values and of what ONNX lacks, as complex numbers, and work for any batch"
        ) from error
    assert program is not None and program.exported_program is not None
    condition = fixed_size(program.exported_program, {name: axes[name] for name in inputs})
    if condition is not None:
        raise CheckpointError(
            f"{path}: torch.onnx fixes a size of {type(shell.network).__name__} that depends on its inputs, as how "
            f"often a loop is run; its graph would be right where {condition} and nowhere else; --format safetensors "
            "packs the weights alone"
        )
    return program.model


@contextlib.contextmanager
def _torch_says_nothing() -> Iterator[None]:
    """Meanwhile torch logs nothing, neither what is not installed nor the stacks of what it then raises."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    levels = {handler: handler.level for handler in handlers}
    for handler in levels:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


def over_weights(
    model: ir.Model, module: nn.Module, network: nn.Module, tensors: EncodedTensors, path: Path
) -> ir.Model:  # fmt: skip
    """The traced graph, optimised, whose weights are inputs; `network` is the copy of `module` that was traced."""
    empty = {name for name, tensor in module.named_buffers() if tensor.is_meta} | set(dict(module.named_parameters()))
    _free_weights(model.graph, network, empty, tensors, path)
    compute_in_float32(model.graph)
    return onnxscript.optimizer.optimize(model, onnx_shape_inference=False)


def compute_in_float32(graph: ir.Graph) -> None:
    """What computes on bfloat16 does so on float32, and its results are rounded to bfloat16: onnxruntime has no kernels
    for it but Cast's. That is what torch does on a CPU."""
    short = ir.DataType.BFLOAT16
    for node in list(graph):
        if node.op_type == "Cast" or not any(value.dtype == short for value in node.outputs):
            continue
        builder = GraphBuilder(graph, before=node, stem=f"wide.{node.name}.")
        for at, value in enumerate(node.inputs):
            if value is not None and value.dtype == short:
                node.replace_input_with(at, _cast(builder, value, ir.DataType.FLOAT))
        builder = GraphBuilder(graph, before=node, stem=f"short.{node.name}.")
        for value in node.outputs:
            if value.dtype != short:
                continue
            value.dtype, uses = ir.DataType.FLOAT, list(value.uses())
            rounded = _cast(builder, value, short)
            for user, at in uses:
                user.replace_input_with(at, rounded)
    graph.sort()


def _cast(builder: GraphBuilder, value: ir.Value, to: ir.DataType) -> ir.Value:
    found = builder.cast(value, to)
    found.dtype, found.shape = to, value.shape
    return found


def _free_weights(graph: ir.Graph, network: nn.Module, empty: set[str], tensors: EncodedTensors, path: Path) -> None:
    """Makes the initialisers that `tensors` hold inputs of the graph, which note their tensor's name."""
    stored = {*tensors, *tensors.tied}
    aliases = {name: group for group in parameter_names(network).values() for name in group}
    for label, value in list(graph.initializers.items()):
        name = label.removeprefix(PREFIX)
        found = next((alias for alias in aliases.get(name, [name]) if alias in stored), None)
        if found is None and name in empty:
            raise ExportError(f"{path}: '{name}' has no values and no stored tensor; {len(stored)} others have")
        if found is not None:
            graph.initializers.pop(label)
            value.const_value = None
            graph.inputs.append(value)
            value.metadata_props["tensor"] = tensors.tied.get(found, found)


def name_ends(graph: ir.Graph, axes: Mapping[str, Mapping[int, str]], outputs: list[str]) -> None:
    """Names inputs, outputs and free dimensions; what is traced gets names that no builder gives."""
    for i, node in enumerate(graph.all_nodes()):
        node.name = f"traced.{node.op_type}.{i}"
        for value in node.outputs:
            value.name = f"traced.{value.name}"
    for value in list(graph.initializers.values()):
        value.name = f"traced.{value.name}"
    symbols: dict[str, str] = {}
    for value, (name, free) in zip(graph.inputs, axes.items(), strict=False):
        value.name = name
        for axis, label in free.items():
            dimension = value.shape[axis] if value.shape is not None else None
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                symbols.setdefault(dimension.value, label)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dimension, symbols) for dimension in value.shape])
    for i, (value, name) in enumerate(zip(graph.outputs, outputs, strict=True)):
        if value in graph.inputs or value in list(graph.outputs)[:i]:  # one value has one name
            graph.outputs[i] = value = _copied(graph, value, name)
        value.name = name


def _copied(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    node = ir.node("Identity", [value], name=f"traced.{name}")
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    graph.append(node)
    return node.outputs[0]


def _renamed(dimension: int | ir.SymbolicDim | None, symbols: Mapping[str, str]) -> int | str | None:
    if dimension is None or isinstance(dimension, int):
        return dimension
    if dimension.value is None:
        return None
    if str(dimension.value) in symbols:  # a sum, too: what is past and what is new are the total
        return symbols[str(dimension.value)]
    return re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), str(dimension.value))
