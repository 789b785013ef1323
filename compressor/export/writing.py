"""Writes the graph of a network by the exporter that knows its family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from compressor.core.artifact import PAIRED_DECODER, PAIRED_ENCODER
from compressor.core.errors import CheckpointError, ExportError
from compressor.core.log import LOGGER
from compressor.core.tensors import EncodedTensors
from compressor.export.decoder import MODEL_FILE, export_decoder
from compressor.export.decoder_config import DecoderConfig, DecoderSizes, decoder_refusal
from compressor.export.forms import Mode
from compressor.graph.periods import as_few_as_tell

if TYPE_CHECKING:
    import onnx_ir as ir

    from compressor.checkpoints import Checkpoint
    from compressor.export.causal import KeyValueCache

UNLIMITED = 2**15
"""Tokens that onnxruntime-genai is told of a network that sets no limit: it wants one."""
_TRACES: WeakKeyDictionary[Any, dict[tuple, ir.Model]] = WeakKeyDictionary()
"""Of each checkpoint. Tracing takes most of the time of an export, and a network is exported several times."""
_WHOLE: WeakSet[Any] = WeakSet()
"""Whose blocks looked alike and are not."""
_CACHES: WeakKeyDictionary[Any, KeyValueCache | str] = WeakKeyDictionary()
"""Of each decoder that is traced: its cache, or why its graph has none."""
_PAIRS: WeakKeyDictionary[Any, dict[str, ir.Model] | str] = WeakKeyDictionary()
"""Of each encoder-decoder: the graphs of both by their files, or why it has none."""


def export_graph(
    checkpoint: Checkpoint, tensors: EncodedTensors, directory: Path, mode: Mode,
    exact: bool, batches: list[dict[str, Tensor]], static: bool = False, file: str = MODEL_FILE,
) -> Path:  # fmt: skip
    """The graph `file` in a directory, over the packed weights beside it: a decoder with its cache, the module as it
    is, or the ONNX graph that it came from. Of an encoder-decoder two graphs beside it, one of each.

    `static`: the module's convolutions compute on int8 activations in the ranges of `batches`. A network of another
    size, whose graph is called otherwise, comes beside the largest, and is no ONNX graph nor encoder-decoder.
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

        graph = export_decoder(config, tensors, directory, mode, exact, file=file)
        if file == MODEL_FILE:
            write_genai_config(config, DecoderConfig.of(config), directory)
        return graph
    from compressor.export.module import export_module

    calibration = batches if static else []
    graph = traced(checkpoint, tensors, batches).clone()
    path = export_module(graph, tensors, directory, mode, exact, calibration, file)
    if file != MODEL_FILE:
        return path
    cache = _CACHES.get(checkpoint)
    if cache is not None and not isinstance(cache, str):
        _write_genai_config(checkpoint, cache, directory)
    pair = _pair_of(checkpoint, tensors, batches)
    if not isinstance(pair, str):
        for name, each in pair.items():
            export_module(each.clone(), tensors, directory, mode, exact, file=name)
    return path


def _pair_of(
    checkpoint: Checkpoint, tensors: EncodedTensors, batches: list[dict[str, Tensor]]
) -> dict[str, ir.Model] | str:  # fmt: skip
    """The graphs of an encoder-decoder's two parts, traced once, none of any other network; or why it has none."""
    config = checkpoint.config or {}
    if not config.get("is_encoder_decoder") or checkpoint.family == "decoder" or not batches:
        return {}
    if checkpoint not in _PAIRS:
        from compressor.export.encoder_decoder import paired_cache, trace_encoder, trace_paired_decoder

        module = checkpoint.build()
        cache = paired_cache(module, batches[0])
        if isinstance(cache, str):
            _PAIRS[checkpoint] = cache
            return cache
        try:
            _PAIRS[checkpoint] = {
                PAIRED_ENCODER: trace_encoder(module, cache, tensors, checkpoint.path),
                PAIRED_DECODER: trace_paired_decoder(module, cache, tensors, checkpoint.path),
            }
        except CheckpointError as error:
            LOGGER.warning("%s; it is written as one graph without a cache", error)
            _PAIRS[checkpoint] = str(error)
    return _PAIRS[checkpoint]


def is_traced(checkpoint: Checkpoint) -> bool:
    """Whether the network's graph is traced by torch: not that of an ONNX graph, nor of a decoder that is known."""
    return checkpoint.kind != "onnx" and _known_decoder(checkpoint) is None


def _known_decoder(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The config of a decoder whose graph is written from it; None of any other network."""
    config = checkpoint.config
    if checkpoint.family != "decoder" or config is None or decoder_refusal(config) is not None:
        return None
    return config


def try_to_trace(checkpoint: Checkpoint, tensors: EncodedTensors, batches: list[dict[str, Tensor]]) -> str | None:
    """Traces a network on as few of its blocks as there are kinds of them, and all of it where that fails.

    Args:
        batches: Of the network's inputs; those of language models are made up.

    Returns:
        Why the graph of a causal decoder, or of an encoder-decoder, will have no cache; None where it will, and of
        other networks.

    Raises:
        CheckpointError: torch cannot trace it.
    """
    cache = _cache_of(checkpoint) if checkpoint.family == "decoder" else None
    short = as_few_as_tell(checkpoint.build())
    if short is None or not _can_be_traced(short, checkpoint, tensors, _example(checkpoint, batches)):
        traced(checkpoint, tensors, batches)
        cache = _CACHES.get(checkpoint)
    found = cache or _pair_of(checkpoint, tensors, batches)
    return found if isinstance(found, str) else None


def _can_be_traced(
    module: nn.Module, checkpoint: Checkpoint, tensors: EncodedTensors, example: dict[str, Tensor]
) -> bool:  # fmt: skip
    from compressor.export.causal import kv_cache, trace_decoder
    from compressor.export.module import trace_module

    cache = kv_cache(module) if checkpoint.family == "decoder" else ""
    try:
        if isinstance(cache, str):
            trace_module(module, example, tensors, checkpoint.path)
        else:
            trace_decoder(module, cache, tensors, checkpoint.path)
    except (CheckpointError, ExportError):
        return False
    return True


def _example(checkpoint: Checkpoint, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs to trace with: of a language model any text, of others the first batch."""
    from compressor.export.module import encoder_example

    if checkpoint.family == "encoder":
        return encoder_example(checkpoint.config or {})
    if checkpoint.family == "decoder" and not batches:
        return {"input_ids": torch.ones(2, 16, dtype=torch.int64)}
    return (batches or [{}])[0]


def _cache_of(checkpoint: Checkpoint) -> KeyValueCache | str:
    from compressor.export.causal import kv_cache

    if checkpoint not in _CACHES:
        _CACHES[checkpoint] = kv_cache(checkpoint.build())
    return _CACHES[checkpoint]


def traced(checkpoint: Checkpoint, tensors: EncodedTensors, batches: list[dict[str, Tensor]]) -> ir.Model:
    """The graph by torch, traced once: of a causal decoder with its cache. Of `tensors` only the names count.

    Raises:
        CheckpointError: torch cannot trace it.
    """
    from compressor.export.module import trace_module

    example = _example(checkpoint, batches)
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in example.items())
    if checkpoint.family == "decoder":
        shapes = ()
    traces, key = _TRACES.setdefault(checkpoint, {}), (frozenset({*tensors, *tensors.tied}), shapes)
    if key not in traces:
        found = _with_cache(checkpoint, tensors) if checkpoint.family == "decoder" else None
        traces[key] = found or trace_module(
            checkpoint.build(), example, tensors, checkpoint.path, checkpoint in _WHOLE
        )  # fmt: skip
    return traces[key]


def retrace(checkpoint: Checkpoint) -> bool:
    """Has the network's graph traced anew, block by block, when it is next exported; False where it was already.

    For a graph that repeats a few blocks and does not compute what the network does: of a forward that does something
    else at some block, as to skip to it from another, the first blocks do not tell.
    """
    from compressor.export.repeating import REPEATED

    if not any(REPEATED in model.graph.metadata_props for model in _TRACES.get(checkpoint, {}).values()):
        return False
    _WHOLE.add(checkpoint)
    del _TRACES[checkpoint]
    return True


def _with_cache(checkpoint: Checkpoint, tensors: EncodedTensors) -> ir.Model | None:
    """The graph of a decoder with its cache; None where there is none to be given, or torch cannot trace it."""
    from compressor.export.causal import trace_decoder

    cache = _cache_of(checkpoint)
    if isinstance(cache, str):
        return None
    try:
        return trace_decoder(checkpoint.build(), cache, tensors, checkpoint.path, checkpoint in _WHOLE)
    except CheckpointError as error:
        LOGGER.warning("%s; its graph gets no KV cache", error)
        _CACHES[checkpoint] = str(error)
        return None


def _write_genai_config(checkpoint: Checkpoint, cache: KeyValueCache, directory: Path) -> None:
    """For onnxruntime-genai, where all layers keep heads of one size."""
    from compressor.export.genai import write_genai_config

    kept, known = {size for layer in cache.layers for size in (layer.key, layer.value)}, cache.settings
    heads, hidden, vocabulary = known
    if len(kept) > 1 or heads is None or hidden is None or vocabulary is None:
        return
    kv_heads, head_dim = kept.pop()
    context = checkpoint.positions or UNLIMITED
    sizes = DecoderSizes(len(cache.layers), hidden, heads, kv_heads, head_dim, vocabulary, context)
    write_genai_config(checkpoint.config or {}, sizes, directory)
