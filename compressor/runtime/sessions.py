"""onnxruntime's sessions: in this process, or for large weights in one of their own.

While it folds and packs weights onnxruntime needs more than their bytes; what it frees stays with glibc, and is given
back when a session is open. In a process of its own that adds nothing to the run's memory, and all of it goes back at
the end. Never imports torch.
"""

from __future__ import annotations

import pickle
import subprocess
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import onnxruntime

from compressor.core.memory import give_back
from compressor.runtime.processes import clean_environment, python

LARGE = 16_000_000
"""Bytes of graph and weights from which a process of its own, which takes a third of a second to start, pays."""


@dataclass(frozen=True)
class Settings:
    """threads      of onnxruntime; all cores when None
    entries      its session's configuration entries
    optimised    a file for the graph that it really runs
    as_it_is     it is such a graph: there is nothing to fold or fuse
    arena        whether onnxruntime keeps what it frees, each session for itself: sooner served, and of many sessions
                 the sum of all peaks, doubled as it grows
    """

    threads: int | None = None
    entries: Mapping[str, str] = field(default_factory=dict)
    optimised: str | None = None
    as_it_is: bool = False
    arena: bool = True

    def open(self, path: str | bytes) -> onnxruntime.InferenceSession:
        """The session of a file, or of a serialised graph, in this process."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised as well
        options.enable_cpu_mem_arena = options.enable_mem_pattern = self.arena
        if self.threads:
            options.intra_op_num_threads = self.threads
        if self.optimised:
            options.optimized_model_filepath = self.optimised
        if self.as_it_is:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        give_back()  # what folding took stays with glibc otherwise, several times the weights
        return session


@dataclass(frozen=True)
class Entry:
    """An input or output of a graph, as onnxruntime describes it."""

    name: str
    type: str
    shape: list


class SessionApart:
    """A session in a process of its own, which ends with this object; of onnxruntime's methods those that are here.

    Raises:
        RuntimeError: What onnxruntime said, or that the process was ended, as by a system short of memory.
    """

    def __init__(self, path: str, settings: Settings) -> None:
        self._process = subprocess.Popen(
            python("-m", "compressor.runtime.session_process"), env=clean_environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=-1,
        )  # fmt: skip
        weakref.finalize(self, _end, self._process)
        self._inputs, self._outputs = self._ask((path, settings))

    def get_inputs(self) -> list[Entry]:
        return self._inputs

    def get_outputs(self) -> list[Entry]:
        return self._outputs

    def run(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names."""
        return self._ask((list(names), dict(feed)))

    def _ask(self, question: tuple) -> Any:
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None and answers is not None
        try:
            _send(questions, question)
            failure, answer = pickle.load(answers)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            raise RuntimeError(
                f"its process ended with status {status}, perhaps for want of memory; found no answer; free some memory"
            ) from error
        if failure:
            raise RuntimeError(failure)
        return answer


def filled(inputs: Mapping[str, Any], shapes: Mapping[str, Sequence[int | None]]) -> dict[str, Any]:
    """The inputs of a language model's graph, what it asks for beside input_ids made up: no padding, nothing before.

    Args:
        shapes: Of the graph's inputs, by name; sizes that are free are None.
    """
    found = dict(inputs)
    shape = np.shape(found.get("input_ids", ()))
    if len(shape) != 2:
        return found
    found.setdefault("attention_mask", np.ones(shape, np.int64))
    found.setdefault("token_type_ids", np.zeros(shape, np.int64))
    found.setdefault("position_ids", np.broadcast_to(np.arange(shape[1]), shape))
    for name, size in shapes.items():
        if name.startswith("past_key_values.") and len(size) == 4 and size[1] and size[3]:
            found.setdefault(name, np.zeros((shape[0], size[1], 0, size[3]), np.float32))
    return found


def in_pieces(
    feed: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[Any]],
    run: Callable[[dict[str, np.ndarray]], list[np.ndarray]],
) -> list[np.ndarray]:  # fmt: skip
    """What `run` gives for all rows of the inputs, in as many pieces as the graph asks for.

    All at once, but where the graph was exported for a fixed batch, whose last piece is filled up with its own rows;
    and row by row where it takes something as a whole: an input without an axis of examples, a state whose examples lie
    along another axis, one number.

    Args:
        shapes: The graph's inputs in order; sizes that are no whole numbers are open.
    """
    n = next((len(array) for array in feed.values() if array.ndim), 0)
    whole = [name for name, array in feed.items() if name in shapes and array.ndim == len(shapes[name]) + 1]
    if whole and n:
        return _row_by_row(feed, whole, n, run)
    first = next(iter(shapes.values()), ())
    size = first[0] if first and isinstance(first[0], int) else None
    if size is None or size < 1 or not n or n == size:
        return run(dict(feed))
    found = []
    for start in range(0, n, size):
        rows = (start + np.arange(size) % min(size, n - start)).astype(np.int64)
        found.append(run({name: array[rows] if np.shape(array)[:1] == (n,) else array for name, array in feed.items()}))
    return [np.concatenate(parts)[:n] if np.ndim(parts[0]) else parts[0] for parts in zip(*found, strict=True)]


def _row_by_row(
    feed: Mapping[str, np.ndarray], whole: Sequence[str], n: int,
    run: Callable[[dict[str, np.ndarray]], list[np.ndarray]],
) -> list[np.ndarray]:  # fmt: skip
    """Outputs that have an axis of one in front are joined along it, others along an axis more."""
    found = []
    for i in range(n):
        found.append(run({name: array[i, ...] if name in whole else array[i : i + 1] for name, array in feed.items()}))
    return [
        np.concatenate(parts) if all(np.shape(part)[:1] == (1,) for part in parts) else np.stack(parts)
        for parts in zip(*found, strict=True)
    ]


def open_inference(path: Path, settings: Settings, apart: bool) -> onnxruntime.InferenceSession | SessionApart:
    """A session on a graph; with `apart` in a process of its own where it is large, else without arena."""
    n_bytes = sum(file.stat().st_size for file in path.parent.glob("model.*"))
    if apart and n_bytes >= LARGE:
        return SessionApart(str(path), settings)
    return replace(settings, arena=settings.arena and not apart).open(str(path))


def optimised_graph(model_path: Path, folder: Path, stem: str = "optimised") -> Path:
    """The file, in `folder`, of the graph that onnxruntime really runs; its constants are in `stem`.data there."""
    file = folder / f"{stem}.onnx"
    entries = {
        "session.optimized_model_external_initializers_file_name": f"{stem}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.disable_prepacking": "1",
    }
    open_inference(model_path, Settings(1, entries, str(file)), apart=True)
    return file


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def _send(stream: IO[bytes], message: Any) -> None:
    pickle.dump(message, stream, protocol=5)
    stream.flush()


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Opens a session as the first question says; runs it for every further one."""
    session = None
    while True:
        try:
            first, second = pickle.load(questions)
        except EOFError:
            return
        try:
            if session is None:
                session = second.open(first)
                entries = (session.get_inputs(), session.get_outputs())
                found: Any = tuple([Entry(e.name, e.type, list(e.shape)) for e in each] for each in entries)
            else:
                found = session.run(first, second)
        except Exception as error:  # onnxruntime's own errors share no narrower class
            _send(answers, (str(error).strip().splitlines()[0], None))
        else:
            _send(answers, (None, found))
