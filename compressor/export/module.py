"""Any torch module as ONNX: traced by torch.onnx without its weights, then given the encoded ones.

Parameters are memory that nobody writes to while the module is traced, and free inputs of the graph while it is
optimised, so that no weight exists as floats and none can be folded. Afterwards each consumer of an encoded tensor is
lowered: MatMul and Gemm to a product, Gather to an embedding, everything else to a constant that folds at load.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor, nn

from compressor.checkpoints.skeleton import parameter_names
from compressor.core.errors import CheckpointError, ExportError
from compressor.core.outputs import named_outputs
from compressor.core.tensors import EncodedTensors
from compressor.export.lowering import IR_VERSIONS, OPSETS, Mode
from compressor.export.rewriting import Rewriting

MODEL_FILE = "model.onnx"
PREFIX = "network."
TRACED_OPSET = 21


def trace_module(module: nn.Module, example: Mapping[str, Tensor], tensors: EncodedTensors, path: Path) -> ir.Model:
    """The graph of a module for `export_module` to write. Of `tensors` only the names are used.

    Args:
        module: Its parameters may be on meta; their values are not used.
        example: Inputs by the names of forward's arguments; a single one may have any other name, or none ("").
        path: Of the checkpoint, to be named in errors.

    Raises:
        CheckpointError: torch cannot trace the module.
        ExportError: There is no example, or a weight is in neither.
    """
    if not example:
        raise ExportError(f"{path}: there is no example of the network's inputs to trace it with; give data")
    notes: list[list[str]] = []
    shell = _Shell(_without_weights(module), list(example), notes.append)
    inputs = {name or "input": value for name, value in _repeated(example).items()}
    model = _traced(shell, inputs, path)
    empty = {name for name, tensor in module.named_buffers() if tensor.is_meta} | set(dict(module.named_parameters()))
    _free_weights(model.graph, shell.network, empty, tensors, path)
    model = onnxscript.optimizer.optimize(model, onnx_shape_inference=False)
    _name_ends(model.graph, inputs, notes[-1])
    return model


def export_module(
    traced: ir.Model, tensors: EncodedTensors, out_dir: Path,
    mode: Mode = "default", exact: bool = False, calibration: Sequence[Mapping[str, Tensor]] = (),
) -> Path:  # fmt: skip
    """Writes `out_dir`/model.onnx over `out_dir`/model.safetensors; returns its path. Changes `traced`.

    The first dimension of every input is free, and the second of integer inputs of two dimensions (tokens). Outputs are
    all that the forward returns, as `core.outputs` names them.

    Args:
        calibration: Batches of inputs. Where there are any, convolutions compute on int8 activations whose ranges are
            those of these batches.

    Raises:
        ExportError: A tensor has an encoding that its consumer cannot use.
    """
    writing = Rewriting(tensors, out_dir, mode, exact, lambda found: _finish(found, mode))
    return writing.write(traced, out_dir / MODEL_FILE, calibration)


def encoder_example(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of an encoder: two sequences, one of them padded; token types where its config knows several."""
    import transformers

    known = transformers.CONFIG_MAPPING[str(config["model_type"])].from_dict(dict(config))
    ids = torch.ones(2, 16, dtype=torch.int64)
    mask = ids.clone()
    mask[1, 11:] = 0
    example = {"input_ids": ids, "attention_mask": mask}
    if getattr(known, "type_vocab_size", 0) > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    return example


class _Shell(nn.Module):
    """Calls the network with inputs by name; tells `note` the names of the outputs that it keeps.

    A list of its own would not do: torch.export restores what a forward changes.
    """

    def __init__(self, network: nn.Module, names: list[str], note: Callable[[list[str]], None]) -> None:
        super().__init__()
        self.network, self.names, self.note = network, names, note

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(inputs) == 1 and not _takes(self.network, self.names[0]):
            found = self.network(*inputs)
        else:
            cached = hasattr(getattr(self.network, "config", None), "use_cache") and _takes(self.network, "use_cache")
            cache = {"use_cache": False} if cached else {}
            found = self.network(**dict(zip(self.names, inputs, strict=True)), **cache)
        outputs = named_outputs(found)
        self.note(list(outputs))
        return tuple(outputs.values())


def _takes(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or (
        argument != "" and any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    )


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy for tracing, in eval mode; its parameters are float32 memory that is never touched."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
    network = copy.deepcopy(module, memo).eval()
    for child in network.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_meta:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            elif buffer is not None and buffer.is_floating_point():
                child._buffers[name] = buffer.float()
    return network


def _repeated(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The example with 2 rows (3 where a sequence has 2 tokens) and no sequence of a single token: torch.export takes
    sizes of 0 and 1 as fixed, and equal sizes for one."""
    wide = {
        name: value.repeat(1, 4) if _is_tokens(value) and value.shape[1] == 1 else value
        for name, value in example.items()
    }
    batch = 3 if any(_is_tokens(value) and value.shape[1] == 2 for value in wide.values()) else 2
    return {name: value[torch.arange(batch) % value.shape[0]] if value.dim() else value for name, value in wide.items()}


def _is_tokens(value: Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()


def _traced(shell: _Shell, inputs: dict[str, Tensor], path: Path) -> ir.Model:
    free = torch.export.Dim.DYNAMIC
    shapes = tuple(
        dict.fromkeys(range(2 if _is_tokens(value) else 1), free) if value.dim() else {} for value in inputs.values()
    )
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns of the absence of torchvision
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                shell.eval(), (tuple(inputs.values()),), dynamic_shapes=(shapes,), dynamo=True, optimize=False,
                opset_version=TRACED_OPSET, verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch's tracer runs somebody else's forward; anything may come out of it
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        network = type(shell.network).__name__
        raise CheckpointError(
            f"{path}: torch.onnx cannot trace {network}; {reason[0]}; its forward must be free of Python branches on "
            "values, and work for any batch"
        ) from error
    finally:
        registration.setLevel(level)
    assert program is not None
    return program.model


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


def _name_ends(graph: ir.Graph, inputs: Mapping[str, Tensor], outputs: list[str]) -> None:
    """Names inputs, outputs and free dimensions; what is traced gets names that no builder gives."""
    for i, node in enumerate(graph.all_nodes()):
        node.name = f"traced.{node.op_type}.{i}"
        for value in node.outputs:
            value.name = f"traced.{value.name}"
    for value in list(graph.initializers.values()):
        value.name = f"traced.{value.name}"
    symbols: dict[str, str] = {}
    for value, (name, example) in zip(graph.inputs, inputs.items(), strict=False):
        value.name = name
        for axis, label in enumerate(("batch", "sequence") if _is_tokens(example) else ("batch",)):
            dimension = value.shape[axis] if value.shape is not None and example.dim() else None
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
    return re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), str(dimension.value))


def _finish(model: ir.Model, mode: Mode) -> None:
    """Drops what nobody uses, and torch's notes about its source files."""
    model.graph.opset_imports[""] = OPSETS[mode]
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    if mode == "standard":
        RemoveUnusedOpsetsPass()(model)
    for node in model.graph:
        node.metadata_props.clear()
        node.version = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.ir_version, model.producer_name, model.producer_version = IR_VERSIONS[mode], "compressor", None
    model.graph.name = "network"
