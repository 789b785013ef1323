"""An ONNX graph cut at its layers: what lies between them runs in onnxruntime, a stretch at a time.

The layers' weights are nobody's constants here: each stretch is a small graph whose inputs are what it needs from
before, so that a layer's input is seen, and its output may be another, without a copy of the graph per layer. Values
are let go after their last use. Sessions are made at their first run, when the types of their inputs are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from compressor.core.errors import CheckpointError, DataError
from compressor.onnx.file import OnnxSource, read_values, used
from compressor.onnx.layers import Layer
from compressor.runtime.sessions import Settings

_QUIET = {"session.intra_op.allow_spinning": "0"}
"""onnxruntime's threads would go on spinning after each stretch, on the cores that torch computes the next layer on:
encoding took nine times as long on two cores."""


@dataclass
class Stretch:
    """Nodes without layers, in order; `inputs` and `outputs` are what crosses their borders."""

    nodes: list[ir.Node]
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    session: Any = None


@dataclass(frozen=True)
class Step:
    """A stretch or a layer, and the values that nobody needs after it."""

    work: Stretch | Layer
    done: tuple[ir.Value, ...]


class Program:
    """A graph's steps. The graph is that of a source, and is not changed."""

    def __init__(self, source: OnnxSource) -> None:
        self.path = source.path
        self.weights = source.weights
        self.model = source.model
        self.graph = source.model.graph
        self.tensors = {value: name for name, value in self.weights.values.items()}
        self.steps = list(self._steps())

    def run(self, stretch: Stretch, values: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray]:
        """The stretch's outputs in order.

        Raises:
            CheckpointError: onnxruntime cannot load it.
            DataError: It cannot compute on these inputs.
        """
        feed = {str(value.name): values[value] for value in stretch.inputs}
        if stretch.session is None:
            stretch.session = self._session(stretch, feed)
        try:
            return stretch.session.run([str(value.name) for value in stretch.outputs], feed)
        except Exception as error:  # onnxruntime's own errors share no narrower class
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{self.path}: onnxruntime cannot run it on these inputs; {reason}") from error

    def _session(self, stretch: Stretch, feed: Mapping[str, Any]) -> onnxruntime.InferenceSession:
        inputs = []
        for name, array in feed.items():
            if not isinstance(array, np.ndarray):
                raise CheckpointError(f"{self.path}: '{name}' is no tensor, which is not supported between layers")
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(onnx.helper.make_tensor_value_info(name, kind, None))
        outputs = [onnx.ValueInfoProto(name=str(value.name)) for value in stretch.outputs]
        kept = [
            onnx.numpy_helper.from_array(read_values(self.path, value.const_value), str(value.name))
            for value in _constants(stretch, self.tensors)
        ]
        nodes = [ir.serde.serialize_node(node) for node in stretch.nodes]
        graph = onnx.helper.make_graph(nodes, "stretch", inputs, outputs, kept)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.model.opset_imports.items()]
        model = onnx.helper.make_model(graph, ir_version=self.model.ir_version, opset_imports=opsets)
        try:
            return Settings(torch.get_num_threads(), _QUIET, arena=False).open(model.SerializeToString())
        except Exception as error:  # as above
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{self.path}: onnxruntime {onnxruntime.__version__} cannot load it; {reason}"
            ) from error

    def _steps(self) -> Iterator[Step]:
        works = self._works()
        needed: dict[ir.Value, int] = {value: len(works) for value in self.graph.outputs}
        for at, work in reversed(list(enumerate(works))):
            if isinstance(work, Stretch):
                made = {value for node in work.nodes for value in node.outputs}
                work.outputs = [value for value in made_in_order(work) if value in needed]
                work.inputs = [value for value in used(work.nodes) if value not in made and not self._is_kept(value)]
                read = work.inputs
            else:
                read = [work.x, *([work.addend] if work.addend is not None and not work.bias else [])]
            for value in read:
                needed.setdefault(value, at)
        last: dict[int, list[ir.Value]] = {}
        for value, at in needed.items():
            last.setdefault(at, []).append(value)
        for at, work in enumerate(works):
            yield Step(work, tuple(last.get(at, ())))

    def _works(self) -> list[Stretch | Layer]:
        """Layers, and between them what is needed, in the order of the graph."""
        layers = {layer.node: layer for layer in self.weights.layers}
        adds = {layer.add: layer.node for layer in self.weights.layers if layer.add is not None}
        wanted = set(self.graph.outputs)
        needed: list[ir.Node] = []
        for node in reversed(list(self.graph)):
            if not any(value in wanted for value in node.outputs):
                continue
            if node in adds:
                wanted.add(adds[node].outputs[0])  # the layer itself adds
                continue
            needed.append(node)
            layer = layers.get(node)
            wanted.update([layer.x, *([layer.addend] if layer.addend is not None else [])] if layer else used([node]))
        works: list[Stretch | Layer] = []
        for node in reversed(needed):
            if node in layers:
                works.append(layers[node])
            elif works and isinstance(works[-1], Stretch):
                works[-1].nodes.append(node)
            else:
                works.append(Stretch([node]))
        return works

    def _is_kept(self, value: ir.Value) -> bool:
        return value.const_value is not None and value not in self.tensors and value.producer() is None


def made_in_order(stretch: Stretch) -> list[ir.Value]:
    return [value for node in stretch.nodes for value in node.outputs]


def _constants(stretch: Stretch, tensors: Mapping[ir.Value, str]) -> list[ir.Value]:
    read = used(stretch.nodes)
    return [value for value in read if value.const_value is not None and value not in tensors and not value.producer()]
