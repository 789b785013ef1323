"""The artifact's files: the packed weights, the graph over them, and what says how the network is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from compressor.checkpoints import Checkpoint
from compressor.checkpoints.reshaping import RECORD
from compressor.core.artifact import PAIRED_DECODER, PAIRED_ENCODER, WEIGHTS
from compressor.core.batch import Batch
from compressor.core.encoding import Affine, Codebook, Sparse
from compressor.core.errors import ExportError
from compressor.core.options import RunOptions
from compressor.core.report import Binary
from compressor.core.sizes import GRAPH
from compressor.core.spec import SparseSpec
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.plan.plan import Plan
from compressor.plan.recipe import Recipe


def write_weights(
    checkpoint: Checkpoint, tensors: EncodedTensors, plan: Plan, folder: Path,
    own: Mapping[str, EncodedTensor] | None = None,
) -> EncodedTensors:  # fmt: skip
    """Config, record of the structure, and weights, which are then read from the file that was written.

    Args:
        own: Tensors that networks of other sizes have for themselves.
    """
    if checkpoint.config is not None:
        (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=1, ensure_ascii=False) + "\n")
    if checkpoint.reshaping is not None:
        (folder / RECORD).write_text(checkpoint.reshaping.text())
    write_tensors(folder / WEIGHTS, _Stored(tensors, plan, own or {}), tensors.tied, own or ())
    written = EncodedTensors([folder / WEIGHTS])
    refuse_unplanned(plan, written)
    return written


def refuse_unplanned(plan: Plan, written: EncodedTensors) -> None:
    """Holds what is written against what was promised. How many weights a tensor keeps is no promise where a pass gives
    each its own share: there the kind is. Of others it is a most: what rounds to zero is not stored either.

    Raises:
        ExportError: A tensor is not stored as the plan says.
    """
    for tensor in plan.tensors:
        found, kind = written.nbytes(tensor.name), written.describe(tensor.name)["kind"]
        shared_out = tensor.prune is not None and tensor.prune.allocates
        fewer = isinstance(tensor.spec, SparseSpec) and found < tensor.bytes_after
        if kind != tensor.describe()["kind"] or (found != tensor.bytes_after and not shared_out and not fewer):
            raise ExportError(
                f"'{tensor.name}' was planned as {tensor.spec.kind} of {tensor.bytes_after} bytes, and is written as "
                f"{kind} of {found}; please report the network and the recipe"
            )


class _Stored(Mapping[str, EncodedTensor]):
    """The tensors as the plan stores them: sparse ones without the codes of zeros, in its order, which tells sizes.
    Then those that networks of other sizes have for themselves."""

    def __init__(self, tensors: EncodedTensors, plan: Plan, own: Mapping[str, EncodedTensor]) -> None:
        self.tensors, self.own = tensors, own
        order = {tensor.name: at for at, tensor in enumerate(plan.tensors)}
        self.names = [*sorted(tensors, key=order.__getitem__), *own]
        self.sparse = {tensor.name for tensor in plan.tensors if isinstance(tensor.spec, SparseSpec)}

    def __getitem__(self, name: str) -> EncodedTensor:
        if name in self.own:
            return self.own[name]
        tensor = self.tensors[name]
        if name not in self.sparse:
            return tensor
        assert isinstance(tensor.encoding, (Affine, Codebook))
        return EncodedTensor(Sparse(tensor.encoding.shape, tensor.encoding), tensor.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_graph(
    checkpoint: Checkpoint, tensors: EncodedTensors, folder: Path, options: RunOptions, recipe: Recipe,
    batches: list[Batch], file: str = GRAPH,
) -> str | None:  # fmt: skip
    """Writes the graph `file`; returns the least onnxruntime that runs it, or None for --format safetensors.

    Raises:
        ExportError: onnxruntime would run it slowly.
    """
    if options.format != "onnx":
        return None
    from compressor.export.check import slow_paths
    from compressor.export.lowering import least_version
    from compressor.export.writing import export_graph

    exact, static = (recipe.export.activations == kind for kind in ("exact", "static_int8"))
    graph = export_graph(checkpoint, tensors, folder, options.mode, exact, batches, static, file)
    paired = [folder / name for name in (PAIRED_ENCODER, PAIRED_DECODER) if (folder / name).exists()]
    slow = [reason for path in (graph, *paired) for reason in slow_paths(path, exact)]
    if slow:
        raise ExportError(f"{graph}: onnxruntime would run it slowly: {'; '.join(slow[:3])}; please report the recipe")
    return least_version([tensors.describe(name) for name in tensors], options.mode)


def binary_layers(folder: Path, tensors: EncodedTensors) -> Binary | None:
    """What binary layers take and run as, where there are some."""
    from compressor.export.kernels import binary_layers

    found = binary_layers(folder / "model.onnx", tensors)
    return Binary.model_validate(found) if found else None
