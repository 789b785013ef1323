"""ONNX graphs (.onnx) with float32 weights: what their nodes multiply with is listed and read as tensors.

Nothing of a graph is run here. Weights may lie in files beside it (external data), and in no other place: a location
that leads out of the graph's folder is refused before anything is read. What is quantised already is refused as well:
its weights are codes.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from compressor.checkpoints.source import Source, refuse_empty
from compressor.core.errors import CheckpointError
from compressor.core.reading import is_inside, refuse_special

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch

    from compressor.onnx.layers import Weights

OLDEST_OPSET = 13
"""From here on axes are inputs, as the nodes of an artifact have them; older graphs are converted."""
MOST_NODES = 1_000_000
DEEPEST = 40
"""Graphs within graphs, and functions that call functions."""
FEW_CODES = 64
QUANTISED = frozenset(
    [
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
        "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "GatherBlockQuantized", "QMoE",
    ]
)  # fmt: skip
QUANTISED_STEMS = ("QLinear", "QGemm", "QAttention", "QOrdered", "QEmbed", "DynamicQuantizeLSTM")
_ERRORS = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError, NotImplementedError,
    RecursionError, MemoryError, AssertionError, OSError,
)  # fmt: skip


@dataclass(kw_only=True)
class OnnxSource(Source):
    """One graph and the files of its external data. `model` holds the graph; nobody changes it."""

    path: Path
    model: ir.Model
    weights: Weights
    program: Any = field(default=None, repr=False)
    """The graph cut into what runs in onnxruntime and what is a layer, once it was needed."""

    @classmethod
    def open(cls, path: Path) -> OnnxSource:
        """Reads the graph, and of weights beside it only where they lie."""
        from compressor.onnx.branches import deciding
        from compressor.onnx.layers import find_weights, gates_as_matrices

        with _refusing(path):
            model = read_model(path)
            files = _external_files(path, model)
            normalise(model)
            _refuse_dangling(model.graph)
            gates_as_matrices(model.graph)
            weights = find_weights(model.graph, lambda value: _is_finite(path, value))
        if not weights.layers:
            found = _counted(Counter(node.op_type for node in model.graph)) or "no nodes"
            inputs = deciding(model.graph)
            raise CheckpointError(
                f"{path}: no MatMul, Gemm, Gather or Conv of its main graph has float32 weights; found {found}; "
                + (_which_branch(inputs) if inputs else "give a float32 model whose layers are not within If or Loop")
            )
        tensors = {info.name: info for info in weights.infos()}
        return cls(kind="onnx", files=[path, *files], tensors=tensors, path=path, model=model, weights=weights)

    def graph_bytes(self) -> int:
        """Of what an artifact's graph keeps: nodes with their names, and initialisers that are no tensors; about."""
        tensors, found = set(self.weights.values.values()), 0
        for graph in every_graph(self.model.graph):
            kept = [value for value in graph.initializers.values() if value not in tensors and value.const_value]
            found += sum(value.const_value.nbytes + len(str(value.name)) + 20 for value in kept if value.const_value)
            for node in graph:
                names = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]
                found += 8 + len(node.op_type) + len(node.name or "") + sum(len(name) + 2 for name in names)
                found += sum(len(name) + 14 for name in node.attributes)
        return found

    def file_of(self, name: str) -> Path:
        tensor = self.weights.values[name].const_value
        return external_file(self.path, tensor) if _is_external(tensor) else self.path

    def read(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(read_values(self.path, self.weights.values[name].const_value))


def read_graph(path: Path) -> ir.Model:
    """The graph of a file as it stands there; weights in other files are not touched.

    Raises:
        CheckpointError: It is damaged, or no ONNX graph.
    """
    import onnx_ir as ir

    refuse_special(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: is not there; fetch it as well")
    refuse_empty(path)
    with _refusing(path):
        return ir.from_proto(_read(path))


def read_model(path: Path) -> ir.Model:
    """The graph of a file, whole and not quantised; weights in other files are not touched.

    Raises:
        CheckpointError: It is damaged, no ONNX graph, or holds codes instead of weights.
    """
    import onnx_ir as ir

    refuse_empty(path)
    with _refusing(path):
        model = ir.from_proto(_converted(path, _read(path)))
        _refuse_quantised(path, model)
    return model


def _read(path: Path) -> onnx.ModelProto:
    """What a file holds, by its readers' own errors; weights in other files are not touched."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    if not proto.HasField("graph"):
        raise ValueError("no graph in it")
    _refuse_deep(proto)
    return proto


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever a damaged graph makes its readers raise becomes a refusal.

    Of names that are no text, attributes of another type than their operator's, references to nothing, onnx and onnx_ir
    take notice in many places, and by as many errors.
    """
    from google.protobuf.message import Error
    from onnx_ir.passes import PassError

    try:
        yield
    except (Error, PassError, *_ERRORS) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be read as ONNX, it is truncated or corrupt; found {path.stat().st_size} bytes and "
            f"{reason!r}; fetch it again"
        ) from error


def normalise(model: ir.Model) -> None:
    """Functions inlined, constants as initialisers of the main graph, branches that always run in the place of their
    If, nodes in order; the graph computes the same."""
    from onnx_ir.passes import common as passes

    from compressor.onnx.branches import settle

    if model.functions:
        passes.InlinePass()(model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    settle(model.graph)
    passes.NameFixPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()


def external_file(path: Path, tensor: Any) -> Path:
    """The file that external data lie in: within the graph's own folder, whatever links lead there.

    Raises:
        CheckpointError: The location leads elsewhere, or nothing is there.
    """
    location = str(tensor.location)
    place, file, found = Path(location), path.parent, False
    inside = not place.is_absolute() and ".." not in place.parts and "\\" not in location and ":" not in location
    try:
        file = path.parent / place
        found = inside and file.is_file()
        inside = inside and (not found or is_inside(file, path.parent))
    except (OSError, ValueError):  # names that no system knows, or links in a circle
        inside = False
    if not inside or not location:
        raise CheckpointError(
            f"{path}: keeps tensor '{tensor.name}' at '{location[:80]}', which is not in its folder; nothing was read "
            "there; put the weights beside the graph"
        )
    if not found:
        raise CheckpointError(f"{path}: its weights are missing; no file {location[:80]} beside it; fetch it as well")
    return file


def read_values(path: Path, tensor: Any) -> Any:
    """A tensor's values as a numpy array of its own; from external data by a plain read of their bytes."""
    import numpy as np

    if not _is_external(tensor):
        try:
            return np.array(tensor.numpy()).reshape(_shape(path, tensor))
        except (*_ERRORS,) as error:
            raise CheckpointError(f"{path}: tensor '{tensor.name}' is damaged; {error}; fetch it again") from error
    file = external_file(path, tensor)
    values = np.empty(_shape(path, tensor), tensor.dtype.numpy())
    with file.open("rb") as stream:
        stream.seek(tensor.offset or 0)
        present = stream.readinto(memoryview(values.reshape(-1).view(np.uint8).data)) if values.size else 0
    if present != values.nbytes:
        raise CheckpointError(f"{file}: is truncated inside of tensor '{tensor.name}'; fetch it again")
    return values


def every_graph(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and those inside of its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph:
        for inner in _inner(node):
            yield from every_graph(inner)


def used(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """The values that nodes read, those of graphs within them that come from outside among them, each once."""
    found: dict[ir.Value, None] = {}
    for node in nodes:
        found |= dict.fromkeys(value for value in node.inputs if value is not None)
        for graph in _inner(node):
            made = {*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)}
            within = used(list(graph)) + list(graph.outputs)
            found |= dict.fromkeys(value for value in within if value not in made)
    return list(found)


def _inner(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            yield attribute.as_graph()
        elif attribute.type.name == "GRAPHS":
            yield from attribute.as_graphs()


def _is_external(tensor: Any) -> TypeGuard[ir.ExternalTensor]:
    import onnx_ir as ir

    return isinstance(tensor, ir.ExternalTensor)


def _shape(path: Path, tensor: Any) -> tuple[int, ...]:
    shape = tuple(tensor.shape.numpy())
    if any(size < 0 for size in shape):
        raise CheckpointError(f"{path}: tensor '{tensor.name}' has shape {shape}; it is corrupt; fetch it again")
    return shape


def _is_finite(path: Path, value: ir.Value) -> bool:
    import numpy as np

    return bool(np.isfinite(read_values(path, value.const_value)).all())


def _refuse_deep(proto: Any) -> None:
    """Refuses what would take for ever to go through: nodes beyond number once functions are inlined."""
    bodies = {(function.domain, function.name, function.overload): function.node for function in proto.functions}
    sizes: dict[tuple, int] = {}

    def size(nodes: Any, depth: int) -> int:
        if depth > DEEPEST:
            raise ValueError("graphs are nested too deeply")
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in bodies:
                if key not in sizes:
                    sizes[key] = size(bodies[key], depth + 1)
                total += sizes[key]
            inner = [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]
            total += 1 + sum(size(graph.node, depth + 1) for graph in inner)
            if total > MOST_NODES:
                raise ValueError(f"more than {MOST_NODES:,} nodes")
        return total

    size(proto.graph.node, 0)


def _converted(path: Path, proto: Any) -> Any:
    """The graph at an opset that artifacts can be written in; weights have to be in the file for that."""
    import onnx
    from onnx import checker, version_converter

    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions or versions[0] >= OLDEST_OPSET:
        return proto
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise CheckpointError(
            f"{path}: is of opset {versions[0]} and has its weights in other files; export it with opset "
            f"{OLDEST_OPSET} or newer"
        )
    try:
        checker.check_model(proto)
        return version_converter.convert_version(proto, OLDEST_OPSET)
    except Exception as error:  # the checker's and the converter's own errors share no narrower class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: is of opset {versions[0]}, and could not be brought to {OLDEST_OPSET}; {reason}; export it with "
            f"opset {OLDEST_OPSET} or newer"
        ) from error


def _refuse_quantised(path: Path, model: ir.Model) -> None:
    graphs = [*every_graph(model.graph), *model.functions.values()]
    types = Counter(node.op_type for graph in graphs for node in graph)
    found = Counter({name: n for name, n in types.items() if name in QUANTISED or name.startswith(QUANTISED_STEMS)})
    found |= Counter({f"weights of {kind}": n for kind, n in _cast_codes(graphs).items()})
    if found:
        raise CheckpointError(
            f"{path}: is already quantised; found {_counted(found)}; its weights are codes, and coding them again "
            "would add its loss to theirs; give the float32 model that it was made from"
        )


def _cast_codes(graphs: Iterable[Any]) -> Counter[str]:
    """Matrices of whole numbers, or of 8-bit floats, that a graph casts to floats before it computes: their types."""
    import onnx_ir as ir

    found: Counter[str] = Counter()
    for node in (node for graph in graphs for node in graph if node.op_type == "Cast" and node.domain == ""):
        value = node.inputs[0]
        made = None if value is None else value.producer()
        held = None if value is None else value.const_value
        if held is None and made is not None and made.op_type == "Constant" and "value" in made.attributes:
            held = made.attributes["value"].as_tensor()
        floats = node.attributes.get_int("to", 0) in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if floats and held is not None and len(held.shape) > 1 and held.dtype.itemsize <= 1 and held.size >= FEW_CODES:
            found[held.dtype.name.lower()] += 1
    return found


def _refuse_dangling(graph: ir.Graph) -> None:
    """Refuses what reads a value that nothing makes, and names that are no text."""
    made = {*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)}
    read = dict.fromkeys([*used(graph), *graph.outputs])
    lost = [str(value.name) for value in read if value not in made]
    if lost:
        raise ValueError(f"nothing makes '{lost[0]}'")
    unnamed = [value.name for value in (*made, *read) if not isinstance(value.name, str)]
    if unnamed:
        raise ValueError(f"the name {unnamed[0]!r} is no text")


def _which_branch(inputs: Sequence[str]) -> str:
    deciding = ", ".join(repr(name) for name in inputs)
    return (
        f"its layers are within an If, and the input {deciding} says which branch runs: each is a network of its own; "
        "give one of them, the graph with that input as an initialiser: docs/onnx.md shows how in four lines"
    )


def _counted(types: Counter[str], most: int = 4) -> str:
    return ", ".join(f"{n} {name}" for name, n in types.most_common(most))


def _external_files(path: Path, model: ir.Model) -> list[Path]:
    """The files of external data, each tensor's bytes checked to be there."""
    import onnx_ir as ir

    files: dict[Path, None] = {}
    graphs = [*every_graph(model.graph), *model.functions.values()]
    for tensor in (value.const_value for graph in graphs[:1] for value in graph.initializers.values()):
        if tensor is None:
            raise CheckpointError(f"{path}: has an initialiser without values; it is corrupt; fetch it again")
        _shape(path, tensor)
        if _is_external(tensor):
            files[checked_file(path, tensor)] = None
    inner = [value.const_value for graph in graphs[1:] if isinstance(graph, ir.Graph)
             for value in graph.initializers.values()]  # fmt: skip
    held = [a.value for graph in graphs for node in graph for a in node.attributes.values() if a.type.name == "TENSOR"]
    for tensor in (*inner, *held):
        if _is_external(tensor):
            raise CheckpointError(
                f"{path}: keeps tensor '{tensor.name}' of an inner graph in another file, which is not supported; "
                "export it with the weights in the main graph"
            )
    return list(files)


def checked_file(path: Path, tensor: Any) -> Path:
    """The file of an external tensor whose bytes are all there."""
    file = external_file(path, tensor)
    needed = math.prod(_shape(path, tensor)) * tensor.dtype.itemsize
    offset, length, present = tensor.offset or 0, tensor.length, file.stat().st_size
    if offset < 0 or (length is not None and length < needed):
        raise CheckpointError(
            f"{path}: tensor '{tensor.name}' has {length} bytes at {offset}, and needs {needed}; it is corrupt"
        )
    if offset + needed > present:
        raise CheckpointError(
            f"{file}: is truncated; it has {present} bytes, tensor '{tensor.name}' ends at {int(offset + needed)}; "
            "fetch it again"
        )
    return file
