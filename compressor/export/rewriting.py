"""A graph whose weights are free inputs becomes one over encoded tensors, and is saved: of whatever origin it is.

The inputs that stand for tensors note their names as `tensor` in their metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor

from compressor.core.errors import ExportError
from compressor.core.log import LOGGER
from compressor.core.tensors import EncodedTensors
from compressor.export.builder import CONTRIBUTED, GraphBuilder, forget_types
from compressor.export.int8_operations import Int8Operation, int8_operations, observed
from compressor.export.int8_regions import regions
from compressor.export.lowering import Lowering, Mode
from compressor.export.range_choice import N_JUDGED, chosen_ranges, held_out, strayed
from compressor.export.ranges import Feed, Range, examples_of, open_graph, seen, values_of
from compressor.export.staging import staged
from compressor.export.static_int8 import StaticInt8, free_scales
from compressor.export.substitution import Substitution

OBSERVED_FILE = "model.observed.onnx"
N_PARTS, ENOUGH_LESS = 4, 0.75
"""Parts of a graph, which are tried alone where all of them together are too much; what is left has to come to less."""


@dataclass(frozen=True)
class Rewriting:
    """How graphs are given the tensors.

    finish   tidies a graph before it is saved
    stem     begins the names of all new values and nodes
    """

    tensors: EncodedTensors
    directory: Path
    mode: Mode
    exact: bool
    finish: Callable[[ir.Model], None]
    stem: str = ""

    def write(self, model: ir.Model, path: Path, calibration: Sequence[Mapping[str, Tensor]] = ()) -> Path:
        """Lowers what uses weights, and saves the graph; `model` is used up.

        Args:
            calibration: Where there are any, convolutions compute on int8 activations where that pays, in ranges that
                are chosen on these batches.
        """
        names = [str(output.name) for output in model.graph.outputs]
        floats = _floats(model) if calibration else set()
        chosen = self._that_pay(model, floats, calibration) if calibration else []
        chosen, ranges = self._ranges(model, floats, chosen, calibration) if chosen else ([], [])
        lowering = self._lowering(GraphBuilder(model.graph, stem=self.stem), self.mode, self.exact, path.stem)
        if chosen:
            StaticInt8(lowering, self._candidates(model.graph, floats, chosen), ranges).rewrite()
        return self._saved(model, lowering, path, names)

    def _candidates(
        self, graph: ir.Graph, floats: set[str], chosen: Sequence[int] | None = None
    ) -> list[Int8Operation]:  # fmt: skip
        """What may compute on int8; of a copy of the graph the same ones are at the same places."""
        found = int8_operations(graph, self._describe, lambda value: value.name in floats)
        return found if chosen is None else [found[at] for at in chosen]

    def _that_pay(
        self, model: ir.Model, floats: set[str], calibration: Sequence[Mapping[str, Tensor]],
        among: Collection[int] | None = None,
    ) -> list[int]:  # fmt: skip
        """Which of the candidates, all or those `among` them, are faster on int8, by the sizes that one example has."""
        candidates = self._candidates(model.graph, floats)
        if not any(operation.kind == "conv" for operation in candidates):
            raise ExportError(
                f"{self.directory}: no convolution is stored as int8; activations: static_int8 needs some"
            )
        values = _values_of(candidates)
        copy = model.clone()
        with self._observing(copy, _values_of(self._candidates(copy.graph, floats))) as (session, names):
            first = examples_of(session, calibration[:1])[0]
            found = values_of(session, first, names)
        shapes = {value: array.shape for value, array in zip(values, found, strict=True)}
        weights = {op: self._weight_shape(op) for op in candidates if op.kind == "conv"}
        allowed = [op for at, op in enumerate(candidates) if among is None or at in among]
        paying = regions(allowed, shapes, weights)
        if not any(operation.kind == "conv" for operation in paying):
            LOGGER.info("no convolution is faster on int8 activations: all compute on floats")
            return []
        return [at for at, operation in enumerate(candidates) if operation in paying]

    def _ranges(
        self, model: ir.Model, floats: set[str], chosen: list[int], calibration: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[int], list[Range]]:  # fmt: skip
        """The ranges that these candidates need, chosen by what they do to the outputs; and the candidates, fewer where
        with all of them the outputs stray too far."""
        outputs = [str(output.name) for output in model.graph.outputs]
        copy = model.clone()
        with self._observing(copy, observed(self._candidates(copy.graph, floats, chosen))) as (session, names):
            examples = examples_of(session, calibration)
            judged = examples[len(examples) - held_out(len(examples)) :] or examples[:N_JUDGED]
            found = seen(session, examples[: len(examples) - held_out(len(examples))], names)
            wanted = [dict(zip(outputs, values_of(session, feed, outputs), strict=True)) for feed in judged]
        with self._trial(model, floats, chosen, judged) as tried:
            ranges = chosen_ranges(found, tried, wanted, judged[0])
            if strayed(tried(ranges), wanted, judged[0]) <= 1:
                return chosen, ranges
        known = dict(zip(observed(self._candidates(model.graph, floats, chosen)), ranges, strict=True))

        def ranges_of(part: Sequence[int]) -> list[Range]:
            return [known[value] for value in observed(self._candidates(model.graph, floats, part))]

        errors: dict[tuple[int, ...], float] = {}
        for part in (tuple(each.tolist()) for each in np.array_split(chosen, min(N_PARTS, len(chosen)))):
            with self._trial(model, floats, part, judged) as tried:
                errors[part] = strayed(tried(ranges_of(part)), wanted, judged[0])
        left, total = list[int](), 0.0
        for part in sorted(errors, key=errors.__getitem__):
            total += errors[part]
            left += part if total <= ENOUGH_LESS else ()
        left = self._that_pay(model, floats, calibration, left) if left else []
        LOGGER.warning("with activations in int8 wherever that is faster the outputs stray too far: %d of %d operations"
                       " compute on them", len(left), len(chosen))  # fmt: skip
        return left, ranges_of(left)

    @contextmanager
    def _trial(
        self, model: ir.Model, floats: set[str], chosen: Sequence[int], judged: Sequence[Feed]
    ) -> Iterator[Callable[[list[Range]], list[dict[str, np.ndarray]]]]:
        """What the outputs are with these candidates on int8, by the ranges that they are given."""
        outputs = [str(output.name) for output in model.graph.outputs]
        trial = model.clone()
        lowering = self._lowering(GraphBuilder(trial.graph, stem=self.stem), "default", False)
        StaticInt8(lowering, self._candidates(trial.graph, floats, chosen), None).rewrite()
        with self._opened(trial, lowering, outputs) as session:

            def tried(ranges: list[Range]) -> list[dict[str, np.ndarray]]:
                scales = free_scales(ranges)
                given = [values_of(session, feed | scales, outputs) for feed in judged]
                return [dict(zip(outputs, values, strict=True)) for values in given]

            yield tried

    @contextmanager
    def _observing(
        self, model: ir.Model, values: list[ir.Value]
    ) -> Iterator[tuple[onnxruntime.InferenceSession, list[str]]]:
        """The graph on floats with more outputs, these values', and their names."""
        names = [f"observed.{i}" for i in range(len(values))]
        builder = GraphBuilder(model.graph, stem=self.stem)
        for name, value in zip(names, values, strict=True):
            copied = builder.op("Identity", value, name=name)
            copied.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(copied)
        every = [str(output.name) for output in model.graph.outputs]
        with self._opened(model, self._lowering(builder, "default", False), every) as session:
            yield session, names

    @contextmanager
    def _opened(
        self, model: ir.Model, lowering: Lowering, outputs: list[str]
    ) -> Iterator[onnxruntime.InferenceSession]:  # fmt: skip
        path = self.directory / OBSERVED_FILE
        try:
            self._saved(model, lowering, path, outputs)
            yield open_graph(path)
        finally:
            path.unlink(missing_ok=True)

    def _weight_shape(self, operation: Int8Operation) -> tuple[int, ...]:
        description = self._describe(operation.node.inputs[1])
        assert description is not None
        return tuple(description["tensor_shape"])

    def _lowering(self, builder: GraphBuilder, mode: Mode, exact: bool, graph: str = "model") -> Lowering:
        return Lowering(self.tensors, builder, mode, exact, self.directory, graph)

    def _describe(self, value: ir.Value | None) -> dict[str, Any] | None:
        name = None if value is None else value.metadata_props.get("tensor")
        return None if name is None else self.tensors.describe(name)

    def _saved(self, model: ir.Model, lowering: Lowering, path: Path, names: list[str]) -> Path:
        """Saves the graph under weights; its outputs are called `names`, whatever writes them now."""
        model.graph.opset_imports[CONTRIBUTED] = 1
        weights = [value for value in model.graph.inputs if "tensor" in value.metadata_props]
        Substitution(model.graph, lowering).substitute(weights)
        for output, name in zip(model.graph.outputs, names, strict=True):
            output.name = name
        lowering.close()
        self.finish(model)
        staged(model, self.mode)
        forget_types(model.graph)
        ir.save(model, path)
        return path


def _values_of(operations: Sequence[Int8Operation]) -> list[ir.Value]:
    """What operations read and write, each once."""
    return list(dict.fromkeys(value for operation in operations for value in (*operation.inputs, operation.output)))


def _floats(model: ir.Model) -> set[str]:
    """The names of all values that are known to be float32."""
    graph = ShapeInferencePass()(model.clone()).model.graph
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return {str(value.name) for value in values if value.dtype == ir.DataType.FLOAT}
