"""Encoder-decoders of transformers as two graphs, called as the libraries that run them call them.

encoder_model.onnx
    Inputs   what the encoder reads (input_ids or input_features), attention_mask where it takes one
    Outputs  last_hidden_state
decoder_model_merged.onnx
    Inputs   input_ids (batch, length), encoder_hidden_states (batch, source, width), encoder_attention_mask (batch,
             source) where the encoder takes one, past_key_values.{i}.decoder.key and .value (batch, heads, past, size),
             past_key_values.{i}.encoder.key and .value (batch, heads, 0 or source, size)
    Outputs  logits (batch, length, vocabulary), present.{i}.… of the same names

There is one decoder for the first step, whose cache is empty, and for those after it: keys and values of the encoder's
states are computed for states that the cache has none of, which are all at first and none afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from compressor.core.errors import first_line, is_out_of_memory
from compressor.core.fake import shapes_alone
from compressor.core.tensors import EncodedTensors
from compressor.export.causal import KeptLayer, cache_of, plain
from compressor.export.tracing import name_ends, over_weights, traced

BATCH, LENGTH, PAST, SOURCE, KNOWN = 2, 3, 5, 11, 4
"""Of the example that is traced: no two alike, and neither 0 nor 1, which torch.export takes as fixed. The cache has
keys of `KNOWN` of the encoder's states."""
_HIDDEN = -1e30
"""Added to the scores of states that are padding."""


@dataclass(frozen=True)
class PairedCache:
    """What the decoder of an encoder-decoder keeps.

    layers   (heads, size) of each layer's keys, values, keys of the encoder's states and values of them
    width    of the encoder's states
    reads    the name of what the encoder reads
    example  of that
    masked   whether attention to the encoder's states takes a mask
    """

    layers: tuple[tuple[tuple[int, int], ...], ...]
    width: int
    reads: str
    example: Tensor
    masked: bool

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(heads, size of a head) by 0.decoder.key, 0.decoder.value, 0.encoder.key, …, in the order of the graph."""
        names = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
        return {
            f"{i}.{name}": size
            for i, layer in enumerate(self.layers)
            for name, size in zip(names, layer, strict=True)
        }  # fmt: skip

    def inputs(self) -> dict[str, Tensor]:
        """An example to trace the decoder with, by name."""
        states = {
            "input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64),
            "encoder_hidden_states": torch.zeros(BATCH, SOURCE, self.width),
        }
        if self.masked:
            states["encoder_attention_mask"] = torch.ones(BATCH, SOURCE, dtype=torch.int64)
        for name, (heads, size) in self.sizes.items():
            states[f"past_key_values.{name}"] = torch.zeros(BATCH, heads, PAST if "decoder" in name else KNOWN, size)
        return states

    def axes(self) -> dict[str, dict[int, str]]:
        """The free axes of `inputs`."""
        axes = {
            "input_ids": {0: "batch_size", 1: "sequence_length"},
            "encoder_hidden_states": {0: "batch_size", 1: "encoder_sequence_length"},
        }
        if self.masked:
            axes["encoder_attention_mask"] = {0: "batch_size", 1: "encoder_sequence_length"}
        for name in self.sizes:
            axes[f"past_key_values.{name}"] = {
                0: "batch_size",
                2: "past_sequence_length" if "decoder" in name else "past_encoder_sequence_length",
            }
        return axes


def paired_cache(module: nn.Module, example: dict[str, Tensor]) -> PairedCache | str:
    """What an encoder-decoder keeps, or why it cannot be written as an encoder and a decoder with a cache.

    Its forward is run without weights or memory, on what torch calls fake tensors.

    Args:
        example: Inputs of the whole network's forward by name.
    """
    name, takes = type(module).__name__, inspect.signature(module.forward).parameters
    wanted = ("encoder_outputs", "decoder_input_ids", "past_key_values")
    lacks = next((each for each in wanted if each not in takes), None)
    if lacks is not None or not callable(getattr(module, "get_encoder", None)):
        return f"{name} takes no {lacks or 'encoder of its own'}"
    reads = str(getattr(module, "main_input_name", "input_ids"))
    if reads not in example:
        return f"{name} reads {reads}, which the data have no example of"
    found = _run(module, {reads: example[reads][:1].repeat(BATCH, *(1 for _ in example[reads].shape[1:]))})
    if isinstance(found, str):
        return f"{name} cannot be run without weights; {found}"
    cache, states = found
    if not isinstance(cache, EncoderDecoderCache):
        return f"{name} keeps {type(cache).__name__}, not keys and values of encoder and decoder"
    layers = []
    for own, other in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=False):
        kept = [getattr(layer, part, None) for layer in (own, other) for part in ("keys", "values")]
        if any(not isinstance(each, Tensor) or each.dim() != 4 for each in kept):
            return f"{name} keeps {type(own).__name__} and {type(other).__name__}, not keys and values of both"
        layers.append(tuple((int(each.shape[1]), int(each.shape[3])) for each in kept if isinstance(each, Tensor)))
    masked = "attention_mask" in inspect.signature(_encoder(module).forward).parameters and reads == "input_ids"
    return PairedCache(tuple(layers), int(states.shape[-1]), reads, example[reads], masked)


def _encoder(module: nn.Module) -> nn.Module:
    return cast(Any, module).get_encoder()


def _run(module: nn.Module, inputs: dict[str, Tensor]) -> tuple[object, Tensor] | str:
    """(what the forward keeps, the encoder's states), or as text why it fails."""
    network = plain(module)
    with shapes_alone():
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        given = {name: torch.zeros_like(value) for name, value in inputs.items()}
        try:
            found = network(**given, decoder_input_ids=ids, use_cache=True)
            return getattr(found, "past_key_values", None), found.encoder_last_hidden_state
        except Exception as error:  # somebody else's forward; anything may come out of it
            if is_out_of_memory(error):
                raise
            return first_line(error)


def trace_encoder(module: nn.Module, cache: PairedCache, tensors: EncodedTensors, path: Path) -> ir.Model:
    """The graph of the encoder, for `export.module.export_module` to write.

    Raises:
        CheckpointError: torch cannot trace it.
    """
    shell = Encoder(plain(module), cache)
    example = cache.example
    tokens = cache.reads == "input_ids"
    inputs = {cache.reads: torch.zeros(BATCH, SOURCE, dtype=torch.int64) if tokens else example[:1].repeat(
        BATCH, *(1 for _ in example.shape[1:]))}  # fmt: skip
    axes: dict[str, dict[int, str]] = {
        cache.reads: {0: "batch_size", 1: "encoder_sequence_length"} if tokens else {0: "batch_size"}
    }
    if cache.masked:
        inputs["attention_mask"] = torch.ones(BATCH, SOURCE, dtype=torch.int64)
        axes["attention_mask"] = {0: "batch_size", 1: "encoder_sequence_length"}
    model = over_weights(traced(shell, inputs, axes, path), module, shell.network, tensors, path)
    name_ends(model.graph, axes, ["last_hidden_state"])
    return _without_unused(model)


def trace_paired_decoder(module: nn.Module, cache: PairedCache, tensors: EncodedTensors, path: Path) -> ir.Model:
    """The graph of the decoder, for `export.module.export_module` to write.

    Raises:
        CheckpointError: torch cannot trace it.
    """
    shell = PairedDecoder(plain(module), cache)
    axes = cache.axes()
    model = over_weights(traced(shell, cache.inputs(), axes, path), module, shell.network, tensors, path)
    name_ends(model.graph, axes, ["logits", *(f"present.{name}" for name in cache.sizes)])
    for value in model.graph.outputs[1:]:
        name = str(value.name).removeprefix("present.")
        heads, size = cache.sizes[name]
        total = "total_sequence_length" if "decoder" in name else "encoder_sequence_length"
        value.shape = ir.Shape(["batch_size", heads, total, size])
    return _without_unused(model)


def _without_unused(model: ir.Model) -> ir.Model:
    """Weights that the graph does not use are none of its inputs."""
    for value in [value for value in model.graph.inputs if "tensor" in value.metadata_props and not value.uses()]:
        model.graph.inputs.remove(value)
    return model


class Encoder(nn.Module):
    """The encoder's forward from a tuple of inputs to its last states."""

    def __init__(self, network: nn.Module, cache: PairedCache) -> None:
        super().__init__()
        self.network, self.cache = network, cache

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = {"attention_mask": inputs[1]} if self.cache.masked else {}
        return (_encoder(self.network)(**{self.cache.reads: inputs[0]}, **mask).last_hidden_state,)


class PairedDecoder(nn.Module):
    """The decoder's forward from (input_ids, states, their mask, keys and values …) to (logits, keys and values …)."""

    def __init__(self, network: nn.Module, cache: PairedCache) -> None:
        super().__init__()
        self.network, self.cache = network, cache

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, states, *rest = inputs
        mask = {}
        if self.cache.masked:
            seen, *rest = rest
            mask = {"attention_mask": torch.where(seen[:, None, None, :] != 0, 0.0, _HIDDEN)}
        rest = list(rest)
        own = _cache(zip(rest[::4], rest[1::4], strict=True))
        other = _cache(zip(rest[2::4], rest[3::4], strict=True))
        kept = EncoderDecoderCache(own, other)
        kept.is_updated = dict.fromkeys(kept.is_updated, False)
        found = self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=states[:, rest[2].shape[2] :]), decoder_input_ids=ids,
            past_key_values=kept, use_cache=True, **mask,
        )  # fmt: skip
        return (found.logits, *_tensors(found.past_key_values))


def _cache(layers: Iterator[tuple[Tensor, Tensor]]) -> DynamicCache:
    found = []
    for keys, values in layers:
        layer = KeptLayer()
        layer.begin(keys, values, False)
        found.append(layer)
    return cache_of(found)


def _tensors(cache: EncoderDecoderCache) -> Iterator[Tensor]:
    caches: tuple[Cache, Cache] = (cache.self_attention_cache, cache.cross_attention_cache)
    for layers in zip(*(each.layers for each in caches), strict=True):
        for layer in layers:
            assert isinstance(layer, KeptLayer)
            assert layer.keys is not None and layer.values is not None
            yield layer.keys
            yield layer.values
