"""Any torch module as ONNX: traced by torch.onnx without its weights, then given the encoded ones.

Parameters are memory that nobody writes to while the module is traced, and free inputs of the graph while it is
optimised, so that no weight exists as floats and none can be folded. Afterwards each consumer of an encoded tensor is
lowered: MatMul and Gemm to a product, Gather to an embedding, everything else to a constant that folds at load.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor, nn

from compressor.core.errors import CheckpointError, ExportError
from compressor.core.outputs import named_outputs
from compressor.core.tensors import EncodedTensors
from compressor.export.fusion import fuse
from compressor.export.lowering import IR_VERSIONS, OPSETS, Mode
from compressor.export.repeating import Ends, repeat
from compressor.export.rewriting import Rewriting
from compressor.export.tracing import name_ends, over_weights, traced, without_weights
from compressor.graph.periods import first_blocks, period_of

MODEL_FILE = "model.onnx"


def trace_module(
    module: nn.Module, example: Mapping[str, Tensor], tensors: EncodedTensors, path: Path, whole: bool = False
) -> ir.Model:  # fmt: skip
    """The graph of a module for `export_module` to write. Of `tensors` only the names are used.

    Args:
        module: Its parameters may be on meta; their values are not used.
        example: Inputs by the names of forward's arguments; a single one may have any other name, or none ("").
        path: Of the checkpoint, to be named in errors.
        whole: Trace every block, instead of a few of those that look alike.

    Raises:
        CheckpointError: torch cannot trace the module.
        ExportError: There is no example, or a weight is in neither.
    """
    if not example:
        raise ExportError(f"{path}: there is no example of the network's inputs to trace it with; give data")
    repeated = None if whole else _first_repeated(module, example, tensors, path)
    found = repeated or _traced(module, example, tensors, path)
    name_ends(found[0].graph, _axes(_inputs(example)), found[1])
    return found[0]


def _inputs(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name or "input": value for name, value in _several(example).items()}


def _traced(
    module: nn.Module, example: Mapping[str, Tensor], tensors: EncodedTensors, path: Path
) -> tuple[ir.Model, list[str]]:  # fmt: skip
    """The graph, and the names of its outputs."""
    notes: list[list[str]] = []
    shell, inputs = _Shell(without_weights(module), list(example), notes.append), _inputs(example)
    return over_weights(traced(shell, inputs, _axes(inputs), path), module, shell.network, tensors, path), notes[-1]


def _first_repeated(
    module: nn.Module, example: Mapping[str, Tensor], tensors: EncodedTensors, path: Path
) -> tuple[ir.Model, list[str]] | None:  # fmt: skip
    """The graph of a few blocks, repeated, as `_traced`; None where they do not tell what all of them do."""
    period = period_of(module)
    if period is None:
        return None
    try:
        model, names = _traced(first_blocks(module, period.names, period.seen), example, tensors, path)
    except (CheckpointError, ExportError):
        return None
    ends = Ends(len(example), len(names))
    return (model, names) if repeat(model.graph, period, tensors, ends) else None


def export_module(
    traced: ir.Model, tensors: EncodedTensors, out_dir: Path,
    mode: Mode = "default", exact: bool = False, calibration: Sequence[Mapping[str, Tensor]] = (),
    file: str = MODEL_FILE,
) -> Path:  # fmt: skip
    """Writes the graph `file` over `out_dir`/model.safetensors beside it; returns its path. Changes `traced`.

    The first dimension of every input is free, and the second of integer inputs of two dimensions (tokens). Outputs are
    all that the forward returns, as `core.outputs` names them.

    Args:
        calibration: Batches of inputs. Where there are any, convolutions compute on int8 activations whose ranges are
            those of these batches.

    Raises:
        ExportError: A tensor has an encoding that its consumer cannot use.
    """
    fuse(traced, mode)
    writing = Rewriting(tensors, out_dir, mode, exact, lambda found: _finish(found, mode))
    return writing.write(traced, out_dir / file, calibration)


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


def _several(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """The axes of each input that are free, and what they are called: what may differ in length by another name."""
    found: dict[str, dict[int, str]] = {}
    lengths: dict[str, int] = {}
    for name, value in inputs.items():
        found[name] = {0: "batch_size"} if value.dim() else {}
        if _is_tokens(value):
            label = "decoder_sequence_length" if name.startswith("decoder_") else "sequence_length"
            same = lengths.setdefault(label, value.shape[1]) == value.shape[1]
            found[name][1] = label if same else f"{name}.{label}"
    return found


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
