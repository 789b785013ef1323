"""Writes the graph of a network by the exporter that knows its family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from compressor.core.tensors import EncodedTensors
from compressor.export.decoder import export_decoder
from compressor.export.decoder_config import decoder_refusal
from compressor.export.forms import Mode

if TYPE_CHECKING:
    import onnx_ir as ir

    from compressor.checkpoints import Checkpoint

_TRACES: WeakKeyDictionary[Any, dict[tuple, ir.Model]] = WeakKeyDictionary()
"""Of each checkpoint. Tracing takes most of the time of an export, and a network is exported several times."""


def export_graph(
    checkpoint: Checkpoint, tensors: EncodedTensors, directory: Path, mode: Mode,
    exact: bool, batches: list[dict[str, Tensor]], static: bool = False,
) -> Path:  # fmt: skip
    """`directory`/model.onnx, over the packed weights beside it: a decoder with its cache, the module as it
    is, or the ONNX graph that it came from.

    `static`: the module's convolutions compute on int8 activations in the ranges of `batches`.
    """
    if checkpoint.kind == "onnx":
        from compressor.export.onnx_graph import export_onnx
        from compressor.onnx.file import OnnxSource

        calibration = batches if static else []
        assert isinstance(checkpoint.source, OnnxSource)
        return export_onnx(checkpoint.source, tensors, directory, mode, exact, calibration)
    config = _known_decoder(checkpoint)
    if config is not None:
        from compressor.export.genai import write_genai_config

        graph = export_decoder(config, tensors, directory, mode, exact)
        write_genai_config(config, None, directory)
        return graph
    from compressor.export.module import export_module

    calibration = batches if static else []
    return export_module(traced(checkpoint, tensors, batches).clone(), tensors, directory, mode, exact, calibration)


def is_traced(checkpoint: Checkpoint) -> bool:
    """Whether the network's graph is traced by torch: not that of an ONNX graph, nor of a decoder that is known."""
    return checkpoint.kind != "onnx" and _known_decoder(checkpoint) is None


def _known_decoder(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The config of a decoder whose graph is written from it; None of any other network."""
    config = checkpoint.config
    if checkpoint.family != "decoder" or config is None or decoder_refusal(config) is not None:
        return None
    return config


def traced(checkpoint: Checkpoint, tensors: EncodedTensors, batches: list[dict[str, Tensor]]) -> ir.Model:
    """The graph by torch, traced once. Of `tensors` only the names count.

    Raises:
        CheckpointError: torch cannot trace it.
    """
    from compressor.export.module import encoder_example, trace_module

    example = encoder_example(checkpoint.config or {}) if checkpoint.family == "encoder" else (batches or [{}])[0]
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in example.items())
    traces, key = _TRACES.setdefault(checkpoint, {}), (frozenset({*tensors, *tensors.tied}), shapes)
    if key not in traces:
        traces[key] = trace_module(checkpoint.build(), example, tensors, checkpoint.path)
    return traces[key]
