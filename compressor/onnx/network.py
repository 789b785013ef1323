"""An ONNX graph as a torch module, so that sweeps, passes and calibration see its layers as those of any network.

Its linear layers, convolutions and embeddings are torch's, with the graph's weights; everything between them runs in
onnxruntime (`onnx_program`). It computes no gradients: what lies between layers has none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.errors import DataError
from compressor.graph.blocks import Gates, InputsFirst
from compressor.onnx.file import OnnxSource
from compressor.onnx.layers import Layer, shape_of, values_of
from compressor.onnx.program import Program, Stretch
from compressor.runtime.sessions import filled, in_pieces

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class OnnxNetwork(Gates):
    """Takes the graph's inputs by name (the first may be positional); returns its outputs by name."""

    def __init__(self, source: OnnxSource) -> None:
        super().__init__()
        if source.program is None:
            source.program = Program(source)
        self._program: Program = source.program
        self._layers: dict[Layer, nn.Module] = {}
        self.gates = tuple(self._program.weights.recurrent)
        made: dict[str, nn.Module] = {}
        for layer in self._program.weights.layers:
            if layer.path not in made:
                made[layer.path] = _module(layer)
                _place(self, layer.path, made[layer.path])
            self._layers[layer] = made[layer.path]
        held = set(self.state_dict(keep_vars=True))
        for name, value in self._program.weights.values.items():
            if name not in held:
                parent, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(torch.empty(shape_of(value), device="meta"))
                _folder(self, parent).register_parameter(leaf, parameter)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        entries = {str(value.name): value for value in self._program.graph.inputs}
        given = dict(zip(entries, args, strict=False)) | kwargs
        shapes = {name: [size if isinstance(size, int) else None for size in value.shape or ()]
                  for name, value in entries.items()}  # fmt: skip
        feed = filled({name: tensor.detach().numpy() for name, tensor in given.items()}, shapes)
        missing = [name for name in entries if name not in feed]
        if missing:
            found = ", ".join(given) or "nothing"
            raise DataError(
                f"{self._program.path}: needs input '{missing[0]}'; found {found}; name the data's arrays so"
            )
        types = {name: value.dtype.numpy() for name, value in entries.items() if value.dtype is not None}
        feed = {name: np.ascontiguousarray(feed[name], types.get(name)) for name in entries}
        names = [str(value.name) for value in self._program.graph.outputs]
        outputs = in_pieces(feed, shapes, self._run)
        return {name: torch.from_numpy(array) for name, array in zip(names, outputs, strict=True)}

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        graph = self._program.graph
        values: dict[Any, Any] = {value: feed[str(value.name)] for value in graph.inputs}
        tensors = self.state_dict(keep_vars=True)
        known = {value: tensors[name] for value, name in self._program.tensors.items()}
        given: dict[Any, Tensor] = {}  # one tensor for all layers of an input, by which they are known to share it
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            for step in self._program.steps:
                if isinstance(step.work, Stretch):
                    read = {v: known[v].float().numpy() if v in known else values[v] for v in step.work.inputs}
                    values |= zip(step.work.outputs, self._program.run(step.work, read), strict=True)
                else:
                    x = step.work.x
                    if x not in given:
                        given[x] = torch.from_numpy(np.ascontiguousarray(values[x]))
                    values[step.work.output] = self._computed(step.work, given[x], values, known)
                for value in step.done:
                    values.pop(value, None)
                    given.pop(value, None)
        return [np.array(values[value]) for value in graph.outputs]

    def _computed(self, layer: Layer, x: Tensor, values: dict[Any, Any], known: dict[Any, Tensor]) -> np.ndarray:
        try:
            return self._call(layer, x, values, known).numpy()
        except (RuntimeError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"{self._program.path}: layer '{layer.path}' cannot be computed on these inputs; {reason}"
            ) from error

    def _call(self, layer: Layer, x: Tensor, values: dict[Any, Any], known: dict[Any, Tensor]) -> Tensor:
        module = self._layers[layer]
        weight = module.weight
        assert isinstance(weight, Tensor)
        if layer.kind == "embedding":
            n_rows = weight.shape[0]
            return module(torch.where(x < 0, x + n_rows, x).long()) if _is_own(module, layer) else weight[x]
        if layer.kind == "conv":
            pads = _pads(layer, x, weight)
            x = functional.pad(x, pads) if any(pads) else x
            product = module(x) if _fits(module, layer) else _convolve(x, weight, layer)
        elif _is_own(module, layer):
            product = module(x)
        else:
            product = x @ (weight if layer.transposed else weight.T)
        if layer.addend is None or layer.bias:
            return product
        added = known[layer.addend] if layer.addend in known else values.get(layer.addend)
        if added is None:
            added = values_of(layer.addend).numpy()
        added = added.float() if isinstance(added, Tensor) else torch.from_numpy(np.ascontiguousarray(added))
        return product + (added.view(-1, *[1] * (product.dim() - 2)) if layer.kind == "conv" else added)


def _module(layer: Layer) -> nn.Module:
    """An empty layer of torch for a node."""
    shape = shape_of(layer.weight)
    if layer.kind == "embedding":
        n_rows, width = shape
        return nn.Embedding(n_rows, width, device="meta")
    if layer.kind == "linear":
        kind = InputsFirst if layer.transposed else nn.Linear
        n_in, n_out = shape if layer.transposed else shape[::-1]
        return kind(n_in, n_out, bias=layer.bias, device="meta")
    stride, dilation, groups = _geometry(layer)
    return _CONVOLUTIONS[len(shape)](
        shape[1] * groups, shape[0], shape[2:], stride, 0, dilation, groups, layer.bias, device="meta"
    )


def _is_own(module: nn.Module, layer: Layer) -> bool:
    """Whether the module computes what the node does; nodes of other kinds may share its weight."""
    kinds = {"embedding": nn.Embedding, "linear": InputsFirst if layer.transposed else nn.Linear}
    return isinstance(module, kinds[layer.kind]) and (layer.bias or getattr(module, "bias", None) is None)


def _fits(module: nn.Module, layer: Layer) -> bool:
    stride, dilation, groups = _geometry(layer)
    same = (module.stride, module.dilation, module.groups) == (stride, dilation, groups)
    return same and (layer.bias or module.bias is None)


def _convolve(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    stride, dilation, groups = _geometry(layer)
    function = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[weight.dim()]
    return function(x, weight, None, stride, 0, dilation, groups)


def _geometry(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Strides, dilations, groups of a convolution."""
    ones = (1,) * (len(shape_of(layer.weight)) - 2)
    found = layer.node.attributes
    return (
        tuple(found.get_ints("strides", ones)), tuple(found.get_ints("dilations", ones)), found.get_int("group", 1)
    )  # fmt: skip


def _pads(layer: Layer, x: Tensor, weight: Tensor) -> list[int]:
    """Zeros around the input, as torch's `pad` takes them: last axis first, before and behind."""
    n = weight.dim() - 2
    stride, dilation, _ = _geometry(layer)
    mode = layer.node.attributes.get_string("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = list(layer.node.attributes.get_ints("pads", (0,) * (2 * n)))
        return [size for axis in reversed(range(n)) for size in (pads[axis], pads[n + axis])]
    found: list[int] = []
    for axis in reversed(range(n)):
        size, span = x.shape[2 + axis], dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        outputs = -(-size // stride[axis])
        total = max(0, (outputs - 1) * stride[axis] + span - size) if mode != "VALID" else 0
        small, large = total // 2, total - total // 2
        found += [large, small] if mode == "SAME_LOWER" else [small, large]
    return found


def _folder(module: nn.Module, path: str) -> nn.Module:
    """The module at a path; empty ones are made on the way."""
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _place(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts the layer at a path; what already stands below that stays below it."""
    parent, _, name = path.rpartition(".")
    above = _folder(module, parent)
    for below, child in (above._modules.get(name) or nn.Module()).named_children():
        layer.add_module(below, child)
    above._modules[name] = layer
