"""The KV cache of any causal decoder of transformers: which layers keep keys and values, and a forward that takes them.

Traced by torch, that forward is a graph like the one that `export/decoder.py` writes for Llama's kin:

Inputs   input_ids, attention_mask (batch, past + length), past_key_values.{i}.key and .value
         (batch, kv heads, past, head size)
Outputs  logits for every position, present.{i}.key and .value

Positions are counted in the attention mask, so that padding may stand on either side. Layers whose attention has a
window keep all that was read, and their mask holds the window. Layers that share another's keys keep none of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from compressor.core.errors import CheckpointError, ExportError, first_line, is_out_of_memory
from compressor.core.fake import shapes_alone
from compressor.core.tensors import EncodedTensors
from compressor.export.repeating import Ends, repeat
from compressor.export.tracing import name_ends, over_weights, traced, without_weights
from compressor.graph.periods import first_blocks, period_of

BATCH, LENGTH, PAST = 2, 3, 5
"""Of the example that is traced: no two alike, and neither 0 nor 1, which torch.export takes as fixed."""
_KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


@dataclass(frozen=True)
class CachedLayer:
    """What one layer keeps: `slot` is its place in the network's own cache.

    key, value   (heads, size of a head)
    window       whether its attention has one
    """

    slot: int
    key: tuple[int, int]
    value: tuple[int, int]
    window: bool


@dataclass(frozen=True)
class KeyValueCache:
    """What a decoder keeps of what it has read: the layers that keep something, of `slots` in all.

    settings   of its config: heads of the queries, hidden size, vocabulary; None where it has no such setting
    """

    layers: tuple[CachedLayer, ...]
    slots: int
    settings: tuple[int | None, int | None, int | None] = (None, None, None)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(heads, size of a head) by 0.key, 0.value, 1.key, …, in the order of the graph."""
        return {
            f"{i}.{part}": getattr(layer, part) for i, layer in enumerate(self.layers) for part in ("key", "value")
        }  # fmt: skip

    def example(self) -> dict[str, Tensor]:
        """Inputs to trace `CachedForward` with, by name."""
        inputs = {
            "input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64),
            "attention_mask": torch.ones(BATCH, PAST + LENGTH, dtype=torch.int64),
        }
        for name, (heads, size) in self.sizes.items():
            inputs[f"past_key_values.{name}"] = torch.zeros(BATCH, heads, PAST, size)
        return inputs

    def given(self, tensors: list[Tensor]) -> DynamicCache:
        """transformers' cache that holds these keys and values."""
        layers = [KeptLayer() for _ in range(self.slots)]
        for layer, keys, values in zip(self.layers, tensors[::2], tensors[1::2], strict=True):
            layers[layer.slot].begin(keys, values, layer.window)
        return cache_of(layers)

    def kept(self, cache: Cache) -> list[Tensor]:
        """The keys and values that a forward left in the cache, in the order of the graph."""
        found = [cast(DynamicLayer, cache.layers[layer.slot]) for layer in self.layers]
        return [tensor for layer in found for tensor in (layer.keys, layer.values) if tensor is not None]


class KeptLayer(DynamicLayer):
    """A layer of the cache that may begin with keys and values; it keeps all, though its attention has a window."""

    def begin(self, keys: Tensor, values: Tensor, window: bool) -> None:
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device, self.is_sliding = keys.dtype, keys.device, window

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


def cache_of(layers: Sequence[KeptLayer]) -> DynamicCache:
    """transformers' cache of these layers, to which none is added."""
    cache = DynamicCache()
    cast(Any, cache).layers = list(layers)
    cache.layer_class_to_replicate = None
    return cache


def kv_cache(module: nn.Module) -> KeyValueCache | str:
    """What a decoder of transformers keeps as keys and values, or why it cannot be given it and asked for it.

    Its forward is run without weights or memory, on what torch calls fake tensors.
    """
    name, takes = type(module).__name__, inspect.signature(module.forward).parameters
    if "past_key_values" not in takes or "attention_mask" not in takes:
        return f"{name} takes no past_key_values: what it keeps is not keys and values"
    found = _first_cache(module)
    if isinstance(found, str):
        return found
    if type(found) is not DynamicCache:
        return f"{name} keeps {type(found).__name__}, which is not keys and values alone"
    layers = []
    for slot, layer in enumerate(found.layers):
        if not isinstance(layer, DynamicLayer | DummyLayer) or type(layer) not in _KNOWN:
            return f"{name} keeps {type(layer).__name__}, which is not keys and values alone"
        keys, values = layer.keys, layer.values
        if keys is None or values is None:
            continue
        if any(each.dim() != 4 or each.shape[2] != LENGTH for each in (keys, values)):
            return f"{name} keeps keys of shape {tuple(keys.shape)}, not (batch, heads, length, size)"
        sizes = [(int(each.shape[1]), int(each.shape[3])) for each in (keys, values)]
        layers.append(CachedLayer(slot, sizes[0], sizes[1], isinstance(layer, DynamicSlidingWindowLayer)))
    if not layers:
        return f"{name} keeps no keys and values"
    config = getattr(module, "config", None)
    heads, hidden, words = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size", "vocab_size"))
    return KeyValueCache(tuple(layers), len(found.layers), (heads, hidden, words))


def plain(module: nn.Module) -> nn.Module:
    """A copy without weights that computes in plain operators, of which none depends on a value.

    Dynamic rotary scaling changes frequencies beyond the positions of the config, which no text may pass.
    """
    network = without_weights(module)
    if isinstance(network, PreTrainedModel):
        network.set_attn_implementation("eager")
        network.set_experts_implementation("batched_mm")
    for child in network.modules():
        if getattr(child, "rope_type", None) == "dynamic":
            vars(child)["rope_type"] = "default"
    return network


def _first_cache(module: nn.Module) -> object:
    """What the forward gives as `past_key_values`, or as text why it fails."""
    network = plain(module)
    with shapes_alone():
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        try:
            found = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        except Exception as error:  # somebody else's forward; anything may come out of it
            if is_out_of_memory(error):
                raise
            return f"{type(module).__name__} cannot be run without weights; {first_line(error)}"
    return getattr(found, "past_key_values", None)


def trace_decoder(
    module: nn.Module, cache: KeyValueCache, tensors: EncodedTensors, path: Path, whole: bool = False
) -> ir.Model:  # fmt: skip
    """The graph of a causal decoder with its cache, for `export.module.export_module` to write.

    Args:
        module, tensors, path, whole: As `export.module.trace_module`'s.
        cache: What `kv_cache` found in the module.

    Raises:
        CheckpointError: torch cannot trace the forward with a cache.
    """
    repeated = None if whole else _first_repeated(module, cache, tensors, path)
    model = repeated or _traced(module, cache, tensors, path)
    axes = _axes(cache)
    name_ends(model.graph, axes, ["logits", *(f"present.{name}" for name in cache.sizes)])
    for value in model.graph.outputs[1:]:  # what was read and what is new is what the mask is of
        heads, size = cache.sizes[str(value.name).removeprefix("present.")]
        value.shape = ir.Shape(["batch_size", heads, "total_sequence_length", size])
    return model


def _axes(cache: KeyValueCache) -> dict[str, dict[int, str]]:
    """The free axes of the decoder's inputs."""
    axes = {name: {0: "batch_size", 2: "past_sequence_length"} for name in cache.example()}
    return axes | {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
    }


def _traced(module: nn.Module, cache: KeyValueCache, tensors: EncodedTensors, path: Path) -> ir.Model:
    shell = CachedForward(plain(module), cache)
    model = traced(shell, cache.example(), _axes(cache), path)
    return over_weights(model, module, shell.network, tensors, path)


def _first_repeated(
    module: nn.Module, cache: KeyValueCache, tensors: EncodedTensors, path: Path
) -> ir.Model | None:  # fmt: skip
    """The graph of a few blocks, repeated; None where they do not tell what all of them do."""
    period = period_of(module)
    if period is None or [layer.slot for layer in cache.layers] != [*range(len(period.names))]:
        return None
    short = first_blocks(module, period.names, period.seen)
    kept = kv_cache(short)
    if isinstance(kept, str) or kept.layers != cache.layers[: period.seen]:
        return None
    try:
        model = _traced(short, kept, tensors, path)
    except (CheckpointError, ExportError):
        return None
    return model if repeat(model.graph, period, tensors, Ends(2, 1, 2)) else None


class CachedForward(nn.Module):
    """The forward of a decoder from (input_ids, attention_mask, keys and values …) to (logits, keys and values …)."""

    def __init__(self, network: nn.Module, cache: KeyValueCache) -> None:
        super().__init__()
        self.network, self.cache = network, cache
        self._counts = "position_ids" in inspect.signature(network.forward).parameters
        self._first = _first_position(network)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, mask, *tensors = inputs
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, tensors[0].shape[2] :] + self._first
        found = self.network(
            input_ids=ids, attention_mask=mask, past_key_values=self.cache.given(tensors), use_cache=True,
            **({"position_ids": positions} if self._counts else {}),
        )  # fmt: skip
        return (found.logits, *self.cache.kept(found.past_key_values))


def _first_position(network: nn.Module) -> int:
    """What positions begin with: of RoBERTa's kin after that of padding, which their table has a row for."""
    tables = [each for name, each in network.named_modules() if isinstance(each, nn.Embedding) and "position" in name]
    return next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0)
