"""One of an artifact's sizes as an artifact alone: its weights in a file of their own, and its graph over them.

The graph is that of the size, whose initialisers point into the new file, and whose cuts through longer rows are gone:
what they left is what the file holds. Every byte that the graph takes is compared, and the outputs are, before the
artifact gets its name.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compressor.checkpoints.reshaping import RECORD as STRUCTURE
from compressor.core.artifact import (
    CARD,
    INSTALLED,
    NOT_NEEDED,
    PAGE,
    REPORT,
    WEIGHTS,
    Artifact,
    beside,
    file_digest,
    refuse_target,
    sealed,
    text_of,
)  # fmt: skip
from compressor.core.errors import CheckpointError, UsageError, VerificationError, first_line
from compressor.core.files import put, resolved, sync_tree, write_text
from compressor.core.reading import is_inside, refuse_links
from compressor.core.report import Gates, Report
from compressor.core.resources import refuse_shortage
from compressor.core.sizes import GRAPH, RECORD, SizeEntry, chosen_size, graph_file
from compressor.core.tensors import EncodedTensors, write_tensors
from compressor.evaluate.bench_process import inputs_for
from compressor.evaluate.session import DecoderSession, ModuleSession, open_session
from compressor.export.loading import size_tensors
from compressor.onnx.file import checked_file, read_graph, read_values
from compressor.report.card import write_card
from compressor.report.page import write_page

_KEPT = (
    "compressor", "source", "recipe", "seed", "mode", "identity", "data", "versions", "structure", "least_onnxruntime",
)  # fmt: skip
"""Sections of compression.json that are as true of a size."""
_GENAI = "genai_config.json"


def extract(directory: Path, size: str, output: Path | None = None, force: bool = False) -> dict[str, Any]:
    """Writes a size of an artifact as an artifact of its own; where it is, and what it takes.

    Args:
        directory: The artifact's.
        size: Its name; the largest is one, too.
        output: The new one's directory, `<directory>-<size>` by default.
        force: Whether it may replace an artifact.

    Raises:
        UsageError: There is no such size, or something else stands in the new one's place, or that is in the artifact.
        CheckpointError: The artifact is damaged.
        VerificationError: The new one would compute something else.
    """
    artifact = Artifact.open(directory)
    sizes, entry = chosen_size(directory, size)
    target = output or beside(directory, f"-{size}")
    refuse_target(target, force)
    if resolved(target).is_relative_to(resolved(directory)):
        raise UsageError(f"{target}: is in the artifact that {size} is taken from; give another directory with -o")
    weights, largest = directory / WEIGHTS, size == sizes.largest
    refuse_links(directory, (WEIGHTS, "config.json", STRUCTURE))
    graph = directory / graph_file(directory, size)
    model = read_graph(graph)
    tensors = EncodedTensors([weights]) if largest else size_tensors(weights, size, entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".extracted-", dir=target.parent))
    aside = scratch.with_name(f"{scratch.name}-replaced")
    try:
        write_tensors(scratch / WEIGHTS, tensors, tensors.tied)
        with _refusing_damage(graph):
            _point(model, graph, tensors, scratch)
        ir.save(model, scratch / GRAPH)
        left = _copy_others(directory, entry, largest, scratch)
        _compare(open_session(graph), open_session(scratch), scratch)
        found = _describe(artifact, entry, size, largest, scratch, target.name)
        sync_tree(scratch)
        put(scratch, target, aside)
    finally:
        for left_over in (scratch, aside):
            shutil.rmtree(left_over, ignore_errors=True)
    return {"directory": str(target), "size": size, "bytes": found, "left_out": left}


@contextlib.contextmanager
def _refusing_damage(graph: Path) -> Iterator[None]:
    """Whatever does not fit together in a graph, its weights and sizes.json becomes a refusal."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        refuse_shortage(error)
        raise CheckpointError(f"{graph}: is damaged; {first_line(error)}; compress again") from error


def _point(model: ir.Model, graph: Path, tensors: EncodedTensors, folder: Path) -> None:
    """Points a graph, which was read from a file, to the weights that lie in the folder.

    Raises:
        CheckpointError: It takes what is not in them.
    """
    written = EncodedTensors([folder / WEIGHTS])
    values = model.graph.initializers
    for name, value in list(values.items()):
        stored = value.const_value
        if not isinstance(stored, ir.ExternalTensor):
            continue
        if checked_file(graph, stored).name != WEIGHTS:
            raise CheckpointError(
                f"{graph}: keeps '{name}' in '{stored.location}', and not in {WEIGHTS}; compress again"
            )
        users = [node for node, _ in value.uses()]
        cuts = [node for node in users if _is_cut(node, value)]
        whole = [node for node in users if node not in cuts]
        tensor, part = _part_of(name, tensors)
        place, before = written.place(tensor, part), tensors.place(tensor, part)
        longer = "stored" in tensors.describe(tensor)
        for cut in cuts if longer else ():
            array = _cut_of(read_values(graph, stored), cut)
            row_bytes = before.nbytes // tensors.describe(tensor)["stored"][0]
            first = ((stored.offset or 0) - before.offset) // row_bytes
            at = place.offset + first * (array.nbytes // len(array))
            _replace(model.graph, cut, _pointing(f"{name}.cut", at, array, stored.dtype, folder))
        if whole or not (cuts and longer):
            array = read_values(graph, stored)
            at = place.offset + (stored.offset or 0) - before.offset
            value.const_value = _pointing(name, at, array, stored.dtype, folder)
        else:
            del values[name]


def _part_of(label: str, tensors: EncodedTensors) -> tuple[str, str]:
    """The tensor and the part that an initialiser is called after."""
    for name in (label, label.rpartition("@")[0]):
        for tensor, part in ((name, "weight"), *_splits(name)):
            known = tensor in tensors or (
                tensor.rpartition(".")[0] in tensors and tensor.endswith((".inner", ".extra"))
            )
            if known and part in tensors.describe(tensor)["parts"]:
                return tensor, part
    raise ValueError(f"it takes '{label}', which is no tensor of this size")


def _splits(name: str) -> list[tuple[str, str]]:
    """Where the name of a tensor may end and that of a part begin: parts have one dot at most."""
    words = name.split(".")
    return [(".".join(words[:-n]), ".".join(words[-n:])) for n in (1, 2) if len(words) > n]


def _is_cut(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node takes the first of the second axis of a constant."""
    if node.op_type != "Slice" or node.inputs[0] is not value or len(node.inputs) != 4:
        return False
    starts, stops, axes = (None if each is None else each.const_value for each in node.inputs[1:])
    if starts is None or stops is None or axes is None or stops.size != 1:
        return False
    return starts.numpy().tolist() == [0] and axes.numpy().tolist() == [1]


def _cut_of(array: np.ndarray, node: ir.Node) -> np.ndarray:
    stop = node.inputs[2]
    assert stop is not None
    assert stop.const_value is not None
    return np.ascontiguousarray(array[:, : int(stop.const_value.numpy()[0])])


def _pointing(name: str, at: int, array: np.ndarray, dtype: ir.DataType, folder: Path) -> ir.ExternalTensor:
    """An initialiser of the bytes of the new file that hold the array.

    Raises:
        ValueError: They do not.
    """
    with (folder / WEIGHTS).open("rb") as file:
        file.seek(max(0, at))
        found = file.read(array.nbytes)
    if at < 0 or found != array.tobytes():
        raise ValueError(f"'{name}' is not what {RECORD} says")
    return ir.ExternalTensor(
        WEIGHTS, at, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name, base_dir=str(folder)
    )  # fmt: skip


def _replace(graph: ir.Graph, node: ir.Node, tensor: ir.ExternalTensor) -> None:
    """Puts an initialiser where a node was."""
    old = node.outputs[0]
    new = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(new)
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)


def _copy_others(directory: Path, entry: SizeEntry, largest: bool, folder: Path) -> list[str]:
    """The files beside graph and weights; those that are left out, as they are of the largest network, or links to
    elsewhere."""
    own = {WEIGHTS, GRAPH, RECORD, STRUCTURE, "config.json", *NOT_NEEDED, *INSTALLED}
    left = []
    for file in sorted(directory.iterdir()):
        if not file.is_file() or file.name in own or file.name.endswith(".onnx"):
            continue
        if not is_inside(file, directory) or (file.name == _GENAI and not largest):
            left.append(file.name)
            continue
        shutil.copy2(file, folder / file.name)
    config = directory / "config.json"
    if config.is_file() and (largest or entry.config is None):
        shutil.copy2(config, folder / config.name)
    elif entry.config is not None:
        (folder / "config.json").write_text(json.dumps(entry.config, indent=1, ensure_ascii=False) + "\n")
    if largest and (directory / STRUCTURE).is_file():
        shutil.copy2(directory / STRUCTURE, folder / STRUCTURE)
    elif not largest and entry.structure is not None:
        (folder / STRUCTURE).write_text(json.dumps(entry.structure, separators=(",", ":"), sort_keys=True))
    return left


def _compare(before: ModuleSession, after: ModuleSession, folder: Path) -> None:
    """Holds what one graph gives against the other, on inputs that are made up.

    Raises:
        VerificationError: They differ.
    """
    outputs = []
    for session in (before, after):
        if isinstance(session, DecoderSession):
            outputs.append({"logits": session.logits(np.arange(8, dtype=np.int64)[None] + 1)})
        else:
            outputs.append(session.run(inputs_for(session)))
    for name, array in outputs[0].items():
        if not np.array_equal(array, outputs[1][name], equal_nan=array.dtype.kind == "f"):
            raise VerificationError(f"{folder}: '{name}' is not what the artifact gives; please report the recipe")


def _describe(artifact: Artifact, entry: SizeEntry, size: str, largest: bool, folder: Path, title: str) -> int:
    """compression.json, page and card of what lies in the folder; the bytes of all that it needs."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name not in NOT_NEEDED}
    ordered: Mapping[str, int] = dict(sorted(files.items(), key=lambda item: (-item[1], item[0])))
    original = (artifact.report.get("size") or {}).get("original_bytes")
    kept = {key: value for key, value in artifact.report.items() if key in _KEPT}
    missed = Gates.model_validate(artifact.report.get("gates") or {}).of_size(size, largest)
    said = kept | {
        "quality": entry.quality, "size": {"bytes": sum(files.values()), "files": ordered, "original_bytes": original},
        "speed": {"measured": False} | _shapes(artifact), "gates": {"passed": not missed, "failures": missed},
        "sha256": {name: file_digest(folder / name) for name in sorted(files)},
        "extracted": {"size": size, "of": artifact.directory.name},
    }  # fmt: skip
    report = Report.model_validate({key: value for key, value in said.items() if value is not None})
    write_text(folder / REPORT, report.text())
    write_page([folder], folder / PAGE, title=title)
    write_card(folder, title=title)
    digests = {name: file_digest(folder / name) for name in (PAGE, CARD)}
    write_text(folder / REPORT, text_of(sealed(report.as_json(), digests)))
    return sum(files.values())


def _shapes(artifact: Artifact) -> dict[str, Any]:
    shapes = (artifact.report.get("speed") or {}).get("input_shapes")
    return {"input_shapes": shapes} if shapes else {}
