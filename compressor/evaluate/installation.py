"""An artifact unfolded once for this machine: the graph that onnxruntime really runs, with its operands, beside the
small one.

    install(directory)          # or where it is there and good, nothing
    graph_to_run(directory)     # model.installed.onnx, or model.onnx
    remove(directory)

The small file is what one keeps and hands on. The large one loads in a tenth of the time and without folding's memory,
and computes the same to the bit. It is of one onnxruntime and one processor: where either has changed it is made anew,
and where that cannot be, the small one runs. A record beside it says what it was made of and by what; it is written
last, and without it nothing else counts. Never imports torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.core.artifact import INSTALLED, INSTALLED_GRAPH, INSTALLED_RECORD, REPORT, Artifact, file_digest
from compressor.core.errors import CompressorError
from compressor.core.files import whole, write_text
from compressor.core.locking import locked
from compressor.core.machine import processor
from compressor.core.reading import read_json
from compressor.evaluate.session import GRAPH, graph_path, unloadable
from compressor.runtime.sessions import optimised_graph

_SCRATCH = ".installing"
_STEM = Path(INSTALLED_GRAPH).stem


class Record(BaseModel):
    """What an installed graph was made of, and by what.

    artifact      SHA-256 of compression.json
    made_of       and of the graph and the weights
    bytes         of those two
    onnxruntime   its version
    processor     whose layouts it may have
    sha256        of the files that were made
    sizes         and their bytes
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str
    made_of: dict[str, str]
    bytes: dict[str, int]
    onnxruntime: str
    processor: str
    sha256: dict[str, str]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Installed:
    """`made` is false where a good one was there."""

    graph: str
    made: bool
    bytes: int
    onnxruntime: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def install(directory: Path) -> Installed:
    """Makes the installed graph of an artifact, where it has none that holds.

    Raises:
        CheckpointError: There is no artifact, it has no graph, or onnxruntime cannot load it.
        UsageError: Another process is at it, or the directory cannot be written.
    """
    Artifact.open(directory)
    graph_path(directory)
    record = _record(directory)
    made = record is None or not _is_of_here(record) or bool(changed_files(directory, record))
    if made:
        record = _made(directory)
    assert record is not None
    return Installed(INSTALLED_GRAPH, made, sum(record.sizes.values()), record.onnxruntime)


def remove(directory: Path) -> list[str]:
    """Removes what `install` made; the names of the files that went."""
    Artifact.open(directory)
    there = [name for name in INSTALLED if (directory / name).exists()]
    _take_away(directory)
    shutil.rmtree(directory / _SCRATCH, ignore_errors=True)
    return there


def graph_to_run(path: Path) -> Path:
    """The installed graph of a directory, where it is of what lies there; else the graph, or the file itself."""
    graph = graph_path(path)
    record = _record(path) if path.is_dir() else None
    if record is None:
        return graph
    try:
        if not _is_of_here(record) or not _fits(path, record):
            _made(path)
    except (CompressorError, OSError):  # a disk that is full or not to be written, or another process is at it
        return graph
    return path / INSTALLED_GRAPH


def installation_state(artifact: Artifact) -> tuple[bool | None, str]:
    """Whether the installed graph is what onnxruntime makes of the artifact, None where it cannot be told; and why."""
    record, again = _record(artifact.directory), "make it anew by `compress install`, or remove it by --remove"
    if record is None:
        return False, f"has no {INSTALLED_RECORD} that can be read; {again}"
    wrong = changed_files(artifact.directory, record)
    if wrong:
        return False, f"{'; '.join(wrong)}; {again}"
    if not _is_of_here(record):
        return None, f"not used: is of onnxruntime {record.onnxruntime} or of another processor; {again}"
    with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
        found = _folded(artifact.directory, Path(scratch))
        digests = {path.name: file_digest(path) for path in found}
    if digests != record.sha256:
        return False, f"is not what onnxruntime {record.onnxruntime} makes of {GRAPH}; {again}"
    return True, f"is what onnxruntime {record.onnxruntime} makes of {GRAPH}, in {sum(record.sizes.values()):,} bytes"


def changed_files(directory: Path, record: Record) -> list[str]:
    """The files that the record is of and that are no longer what they were, each with what is wrong."""
    known = record.made_of | record.sha256 | {REPORT: record.artifact}
    found = []
    for name, digest in known.items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            found.append(f"{name} is gone")
        elif file_digest(path) != digest:
            found.append(f"{name} has changed")
    return found


def _made(directory: Path) -> Record:
    """The record of a new installed graph: its files first, itself last."""
    scratch = directory / _SCRATCH
    with locked(scratch, "installation"):
        _take_away(directory)
        files = _folded(directory, scratch)
        sources = sorted(path for path in directory.glob("model.*") if path.name not in INSTALLED)
        record = Record(
            artifact=file_digest(directory / REPORT), made_of={path.name: file_digest(path) for path in sources},
            bytes={path.name: path.stat().st_size for path in sources}, onnxruntime=onnxruntime.__version__,
            processor=processor(), sha256={path.name: file_digest(path) for path in files},
            sizes={path.name: path.stat().st_size for path in files},
        )  # fmt: skip
        for path in files:
            with whole(directory / path.name) as partial:
                os.replace(path, partial)
        write_text(directory / INSTALLED_RECORD, record.model_dump_json(indent=1) + "\n")
    return record


def _folded(directory: Path, folder: Path) -> list[Path]:
    """The graph that onnxruntime really runs and its operands, in `folder`."""
    try:
        optimised_graph(directory / GRAPH, folder, _STEM)
    except Exception as error:  # onnxruntime's own errors share no narrower class
        raise unloadable(directory / GRAPH, error) from error
    return sorted(path for path in folder.iterdir() if path.name in INSTALLED)


def _take_away(directory: Path) -> None:
    for name in INSTALLED:  # the record first
        (directory / name).unlink(missing_ok=True)


def _record(directory: Path) -> Record | None:
    """The record of a directory; None where there is none that says what one says."""
    path = directory / INSTALLED_RECORD
    if not path.is_file():
        return None
    try:
        return Record.model_validate(read_json(path))
    except (CompressorError, ValidationError):
        return None


def _is_of_here(record: Record) -> bool:
    return (record.onnxruntime, record.processor) == (onnxruntime.__version__, processor())


def _fits(directory: Path, record: Record) -> bool:
    """Whether the files are those of the record, as far as can be told at once: by sizes, and the graph's hash."""
    sizes = record.bytes | record.sizes
    if INSTALLED_GRAPH not in record.sizes or GRAPH not in record.made_of:
        return False
    for name, size in sizes.items():
        path = directory / name
        if Path(name).name != name or not path.is_file() or path.stat().st_size != size:
            return False
    return file_digest(directory / GRAPH) == record.made_of[GRAPH]
