"""A graph whose weights are free inputs becomes one over encoded tensors, and is saved: of whatever origin it is.

The inputs that stand for tensors note their names as `tensor` in their metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from compressor.core.errors import ExportError
from compressor.core.tensors import EncodedTensors
from compressor.export.builder import CONTRIBUTED, GraphBuilder
from compressor.export.int8_operations import int8_operations, observed
from compressor.export.lowering import Lowering, Mode
from compressor.export.ranges import Range, output_ranges
from compressor.export.staging import staged
from compressor.export.static_int8 import StaticInt8
from compressor.export.substitution import Substitution

OBSERVED_FILE = "model.observed.onnx"


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
            calibration: Where there are any, convolutions compute on int8 activations in the ranges of these batches.
        """
        names = [str(output.name) for output in model.graph.outputs]
        ranges = self._ranges(model.clone(), calibration) if calibration else []
        lowering = self._lowering(GraphBuilder(model.graph, stem=self.stem), self.mode, self.exact)
        if calibration:
            StaticInt8(lowering, int8_operations(model.graph, self._describe), ranges).rewrite()
        return self._saved(model, lowering, path, names)

    def _ranges(self, model: ir.Model, calibration: Sequence[Mapping[str, Tensor]]) -> list[Range]:
        """The ranges that int8 operations need, from the same graph on floats."""
        values = observed(int8_operations(model.graph, self._describe))
        if not values:
            raise ExportError(
                f"{self.directory}: no convolution is stored as int8; activations: static_int8 needs some"
            )
        names = [f"observed.{i}" for i in range(len(values))]
        builder = GraphBuilder(model.graph, stem=self.stem)
        for name, value in zip(names, values, strict=True):
            seen = builder.op("Identity", value, name=name)
            seen.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(seen)
        path = self.directory / OBSERVED_FILE
        try:
            every = [str(output.name) for output in model.graph.outputs]
            self._saved(model, self._lowering(builder, "default", True), path, every)
            return output_ranges(path, calibration, names)
        finally:
            path.unlink(missing_ok=True)

    def _lowering(self, builder: GraphBuilder, mode: Mode, exact: bool) -> Lowering:
        return Lowering(self.tensors, builder, mode, exact, self.directory)

    def _describe(self, value: ir.Value | None) -> dict[str, Any] | None:
        name = None if value is None else value.metadata_props.get("tensor")
        return None if name is None else self.tensors.describe(name)

    def _saved(self, model: ir.Model, lowering: Lowering, path: Path, names: Sequence[str]) -> Path:
        """Lowers what is left, and saves the graph, whose outputs have these names, whatever gives them now."""
        model.graph.opset_imports[CONTRIBUTED] = 1
        weights = [value for value in model.graph.inputs if "tensor" in value.metadata_props]
        Substitution(model.graph, lowering).substitute(weights)
        for output, name in zip(model.graph.outputs, names, strict=True):
            output.name = name
        lowering.close()
        self.finish(model)
        staged(model, self.mode)
        ir.save(model, path)
        return path
