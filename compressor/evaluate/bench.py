"""Load time, memory and speed of an artifact in onnxruntime, and its size.

Measured in a process of its own, so that memory is the artifact's. `private` is anonymous memory, which nothing else
can use; `mapped` are pages of files, which the system takes back when it needs them. Both are known on Linux only, and
None elsewhere (`core.machine`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.core.artifact import INSTALLED, NOT_NEEDED, Artifact, is_artifact
from compressor.core.errors import CheckpointError
from compressor.core.machine import private_memory
from compressor.evaluate.installation import graph_to_run
from compressor.evaluate.session import graph_path
from compressor.plan.recipe import MEASURED_TEXT
from compressor.runtime.processes import clean_environment, python

POLL_SECONDS = 0.01


def bench(
    directory: str | Path,
    threads: int | None = None,
    prompt: int = 16,
    new: int = 64,
    prefill: int = MEASURED_TEXT,
    repeats: int = 3,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Measures an artifact in a fresh process.

    Args:
        threads: Of onnxruntime; all cores when None.
        prompt, new: Tokens given and tokens generated for `decode_tokens_per_second` (the prompt's time left out).
        prefill: Tokens given at once for `prefill_tokens_per_second`.
        repeats: Of a decoder's speeds, of which the median counts; latencies are timed until they are stable.
        shapes: Of the inputs, by name, where sizes are open; of an artifact those that it was measured with before.

    Returns:
        `kind`, `threads`, `load_seconds`, `load_cpu_seconds`, `memory` (bytes: start, loaded, peak_private,
        peak_resident; `loading`: what opening the graph adds, resident: its `peak`, and what is there `after`;
        `running`: the `peak` that opening and running add, of decoders with a text of so many `n_tokens`, and how they
        grow `per_thousand_tokens`), and for decoders the two speeds, for other graphs `latency_seconds` per run of one
        input and `latency_error`, its relative standard error.

    Raises:
        CheckpointError: The artifact cannot be opened or run.
    """
    graph = graph_to_run(Path(directory))
    shapes = dict(shapes or _shapes_before(graph.parent))
    settings = {
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "path": str(graph), "threads": threads, "prompt": prompt, "new": new, "prefill": prefill, "repeats": repeats,
    }  # fmt: skip
    output, peak = _in_a_process(settings, graph)
    found = json.loads(output)
    found["memory"]["peak_private"] = max(peak, found["memory"]["loaded"]["private"] or 0) or None
    return found


def alternated(
    graphs: Sequence[Path], threads: int | None = None, shapes: Mapping[str, Sequence[int]] | None = None,
    processor: bool = False,
) -> list[dict[str, float]]:  # fmt: skip
    """`latency_seconds` and `latency_error` of each graph, run in turn in one fresh process until they are stable.

    Args:
        processor: Whether the processor's time is taken, which other processes change little. Of several threads it
            counts those that wait, too.

    Raises:
        CheckpointError: One cannot be opened or run.
    """
    settings = {
        "alternated": [str(graph) for graph in graphs], "threads": threads, "processor": processor,
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
    }  # fmt: skip
    return json.loads(_in_a_process(settings, graphs[0])[0])


@dataclass(frozen=True)
class Pair:
    """Seconds of a graph and of the original, each the least of the medians of its blocks, and how far the ratios of
    neighbouring blocks lie apart: half of what the middle half of them spans, as a share."""

    latency: float
    original: float
    spread: float

    @property
    def share(self) -> float:
        """Of the original's time."""
        return self.latency / self.original


def paired(
    graph: Path, original: Path, threads: int | None = None, batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None, blocks: int = 5,
) -> Pair:  # fmt: skip
    """A graph beside the original in a fresh process: blocks of 20 runs, in turn.

    Raises:
        CheckpointError: One cannot be opened or run.
    """
    settings = {
        "paired": [str(graph_to_run(graph)), str(graph_to_run(original))], "threads": threads, "batch": batch,
        "blocks": blocks, "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
    }  # fmt: skip
    found, beside = json.loads(_in_a_process(settings, graph)[0])
    low, middle, high = statistics.quantiles([a / b for a, b in zip(found, beside, strict=True)], n=4)
    return Pair(min(found), min(beside), (high - low) / 2 / middle)


def _in_a_process(settings: Mapping[str, Any], graph: Path) -> tuple[str, int]:
    """What `bench_process` prints of settings, and the most private memory that its process had."""
    command = python("-m", "compressor.evaluate.bench_process", json.dumps(settings))
    process = subprocess.Popen(
        command, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, private_memory(process.pid) or 0)
            time.sleep(POLL_SECONDS)
        output, errors = process.communicate()
    finally:
        process.kill()
    if process.returncode != 0:
        last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise CheckpointError(f"{graph}: could not be measured; {last.partition('CheckpointError: ')[2] or last}")
    return output, peak


def _shapes_before(directory: Path) -> dict[str, Any]:
    """The inputs' shapes that an artifact's report holds."""
    if not is_artifact(directory):
        return {}
    return (Artifact.open(directory).report.get("speed") or {}).get("input_shapes") or {}


def size(directory: str | Path) -> dict[str, Any]:
    """Bytes of every file that running the artifact needs: {"bytes": in all, "files": {name: bytes}}, largest first.

    Without what `compress install` has made of them.

    Raises:
        CheckpointError: There is no graph in the directory.
    """
    directory = graph_path(Path(directory)).parent
    files = {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in (*NOT_NEEDED, *INSTALLED)
    }
    ordered = dict(sorted(files.items(), key=lambda item: (-item[1], item[0])))
    return {"bytes": sum(ordered.values()), "files": ordered}
