"""What `bench` runs in a process of its own: opens the artifact, times it, prints JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compressor.checkpoints.positions import positions_of
from compressor.core.errors import CheckpointError
from compressor.core.machine import memory_of
from compressor.evaluate.reader import reader_of
from compressor.evaluate.session import DTYPES, DecoderSession, ModuleSession, open_session

STABLE = 0.01
"""Relative standard error of a latency that is known well enough."""
LEAST_RUNS, LEAST_SECONDS, MOST_SECONDS = 5, 0.5, 10.0
"""Of timing, however steady or unsteady the machine is."""
LEAST_TEXT = 512
"""Tokens that tell what a longer text takes: of fewer it drowns in what onnxruntime takes at a time."""
WARM, RUNS = 3, 20
"""Of a graph that is measured beside another: before, and in each block."""
SEQUENCE = 128
"""For open axes of token inputs."""
PIXELS = 224
"""For open axes of images."""


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Load time, memory before and after it, and speed."""
    start = memory_of()
    began, worked = time.perf_counter(), time.process_time()
    session = open_session(settings["path"], settings["threads"])
    seconds_taken, work = time.perf_counter() - began, time.process_time() - worked
    loaded, taken = memory_of(), start["resident"]
    loading = {
        name: None if n is None or taken is None else max(0, n - taken)
        for name, n in (("peak", loaded["peak_resident"]), ("after", loaded["resident"]))
    }
    running: dict[str, int | None] = {}
    if isinstance(session, DecoderSession):
        running = text_memory(session, settings)
        kind, speed = "decoder", decoder_speed(session, settings)
    else:
        kind = "encoder" if "input_ids" in session.inputs else "module"
        inputs = inputs_for(session, settings["shapes"])
        (latency,) = latencies([lambda: session.run(inputs)])
        speed = {
            **latency,
            "input_shapes": {name: list(array.shape) for name, array in inputs.items()},
        }
    most = memory_of()["peak_resident"]
    running = {"peak": None if most is None or taken is None else max(0, most - taken), **running}
    return {
        "kind": kind,
        "threads": settings["threads"] or os.cpu_count(),
        "load_seconds": seconds_taken,
        "load_cpu_seconds": work,
        "memory": {"start": start, "loaded": loaded, "loading": loading, "running": running, "peak_resident": most},
        **speed,
    }


def decoder_speed(session: DecoderSession, settings: dict[str, Any]) -> dict[str, float]:
    """Tokens per second one at a time after a prompt, and of many at once, as `generate` reads them."""
    vocabulary = session.config.get("vocab_size") or 256
    longest = positions(session, settings["prompt"] + settings["prefill"] + settings["new"])
    n, prefill = min(settings["new"], longest // 2), min(settings["prefill"], longest)
    ids = np.random.default_rng(0).integers(0, vocabulary, size=max(settings["prompt"], prefill))
    prompt, many = ids[: min(settings["prompt"], longest - n)], ids[:prefill]
    decoding = [decode_seconds(session, prompt, n) for _ in range(settings["repeats"] + 1)][1:]
    return {
        "decode_tokens_per_second": n / statistics.median(decoding),
        "prefill_tokens_per_second": prefill
        / seconds(lambda: reader_of(session, prefill).read(many), settings["repeats"]),
    }


def text_memory(session: DecoderSession, settings: dict[str, Any]) -> dict[str, int | None]:
    """How many tokens are read at most, and what a thousand of them take; of short texts that is not known."""
    n = positions(session, max(settings["prefill"], settings["prompt"] + settings["new"]))
    ids = np.random.default_rng(0).integers(0, session.config.get("vocab_size") or 256, size=n)
    reader, half = reader_of(session, n), n // 2
    reader.read(ids[:half])
    first = memory_of()["resident"]
    reader.read(ids[half:])
    last = memory_of()["resident"]
    if first is None or last is None or n < LEAST_TEXT:
        return {"n_tokens": n, "per_thousand_tokens": None}
    return {"n_tokens": n, "per_thousand_tokens": max(0, last - first) * 1000 // (n - half)}


def positions(session: ModuleSession, wanted: int) -> int:
    """`wanted` tokens, or as many as the network has positions for."""
    return min(wanted, positions_of(session.config) or wanted)


def decode_seconds(session: DecoderSession, prompt: np.ndarray, n: int) -> float:
    """Time of `n` tokens after the first, which the prompt's run gives."""
    tokens = session.generate(prompt, n + 1, stop=())
    next(tokens)
    began = time.perf_counter()
    for _ in tokens:
        pass
    return time.perf_counter() - began


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The median after one run to warm up."""
    run()
    return statistics.median(_timed(run) for _ in range(repeats))


def latencies(runs: Sequence[Callable[[], object]], processor: bool = False) -> list[dict[str, float]]:
    """The median seconds of each, and its relative standard error: run in turn, until all of them are stable.

    In turn, since a machine that is slow for a while is so for all. Of n runs the error of a median is 1.25 σ / √n,
    where σ is what the quartiles of a normal distribution say.
    """
    for run in runs:
        run()
    taken: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    while True:
        for run, times in zip(runs, taken, strict=True):
            times.append(_timed(run, processor))
        passed, n = time.perf_counter() - began, len(taken[0])
        if n >= LEAST_RUNS and (
            passed >= MOST_SECONDS or (passed >= LEAST_SECONDS and max(map(_relative_error, taken)) <= STABLE)
        ):
            break
    return [{"latency_seconds": statistics.median(times), "latency_error": _relative_error(times)} for times in taken]


def _timed(run: Callable[[], object], processor: bool = False) -> float:
    clock = time.process_time if processor else time.perf_counter
    began = clock()
    run()
    return clock() - began


def _relative_error(times: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return 1.25 * (high - low) / 1.35 / len(times) ** 0.5 / middle


def alternated(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Latencies of several graphs on the same inputs, of the same sizes; in the processor's time where it is asked."""
    sessions = [open_session(path, settings["threads"]) for path in settings["alternated"]]
    inputs = [inputs_for(session, settings["shapes"]) for session in sessions]
    return latencies(
        [
            lambda session=session, given=given: session.run(given)
            for session, given in zip(sessions, inputs, strict=True)
        ],
        settings["processor"],
    )


def paired(settings: dict[str, Any]) -> list[list[float]]:
    """Of two graphs, the median seconds of each block of runs: the blocks alternate."""
    sessions = [open_session(path, settings["threads"]) for path in settings["paired"]]
    given = [inputs_for(session, settings["shapes"], settings["batch"]) for session in sessions]
    for session, inputs in zip(sessions, given, strict=True):
        for _ in range(WARM):
            session.run(inputs)
    medians: list[list[float]] = [[] for _ in sessions]
    for _ in range(settings["blocks"]):
        for session, inputs, found in zip(sessions, given, medians, strict=True):
            times = [_timed(lambda session=session, inputs=inputs: session.run(inputs)) for _ in range(RUNS)]
            found.append(statistics.median(times))
    return medians


def inputs_for(
    session: ModuleSession, shapes: dict[str, list[int]] | None = None, batch: int | None = None
) -> dict[str, np.ndarray]:  # fmt: skip
    """One example of random values, or a `batch`; ones for token masks, tokens below the vocabulary's size.

    Open axes are as in `shapes`, where the input is there, or is the only one.

    Raises:
        CheckpointError: The graph takes no batch of that size.
    """
    generator = np.random.default_rng(0)
    inputs = {}
    for name, entry in session.inputs.items():
        dtype = np.dtype(DTYPES[entry.type])
        open_axis = PIXELS if len(entry.shape) == 4 else positions(session, SEQUENCE)
        known = (shapes or {}).get(name) or []
        if shapes and len(shapes) == len(session.inputs) == 1:
            known = next(iter(shapes.values()))
        known = known[1:] if len(known) == len(entry.shape) + 1 else known  # it takes an example as a whole
        fits = len(known) == len(entry.shape)
        open_axes = list(known) if fits else [1, *[open_axis] * len(entry.shape)]
        if batch is not None and open_axes:
            open_axes[0] = batch
        shape = [each if isinstance(each, int) else open_axes[axis] for axis, each in enumerate(entry.shape)]
        if batch not in (None, 1) and shape and shape[0] != batch:
            raise CheckpointError(f"{session.path}: '{name}' takes {shape[0]} at a time; leave --batch out")
        if dtype.kind == "f":
            inputs[name] = generator.standard_normal(shape).astype(dtype)
        elif name == "input_ids":
            inputs[name] = generator.integers(0, session.config.get("vocab_size") or 2, size=shape).astype(dtype)
        else:
            inputs[name] = (np.ones if "mask" in name else np.zeros)(shape, dtype)
    return inputs


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(alternated(asked) if "alternated" in asked else paired(asked) if "paired" in asked
                     else measure(asked)))  # fmt: skip
