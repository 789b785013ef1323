"""What `bench_speed.py` runs in a process of its own, without torch: opens a model, reads with it, prints JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import LlamaCpp

from compressor.core.machine import memory_of
from compressor.evaluate.reader import GrowingCache, Reader, reader_of
from compressor.evaluate.session import DecoderSession


def measure(asked: dict[str, Any]) -> dict[str, float]:
    """`asked`: path, kind (artifact, plain, llama.cpp), threads, config, prompt and steps in tokens, warm."""
    length = asked["prompt"] + asked["steps"]
    before, began = memory_of(), time.process_time()
    if asked["kind"] == "llama.cpp":
        llama = LlamaCpp(Path(asked["path"]), length, asked["threads"])
        session, vocabulary = None, llama.vocabulary
    else:
        session, vocabulary = DecoderSession(asked["path"], asked["threads"]), asked["config"]["vocab_size"]
        session.config = asked["config"]  # the builder's folder has none of its own
        llama = None
    load, loaded = time.process_time() - began, memory_of()

    def begun() -> Reader | LlamaCpp:
        if session is None:
            assert llama is not None
            llama.clear()
            return llama
        if asked["kind"] == "plain":
            session.keeps_last = False
            return GrowingCache(session)
        session.in_place |= asked["shared"]
        return reader_of(session, length)

    ids = np.random.default_rng(0).integers(0, vocabulary, size=length)
    if asked["warm"]:
        _read(begun(), ids[: asked["prompt"]], ids[:8])
    prefill, decoding = _read(begun(), ids[: asked["prompt"]], ids[asked["prompt"] :])
    start, peak, after = before["resident"], memory_of()["peak_resident"], loaded["resident"]
    assert start is not None and peak is not None and after is not None
    found = {
        "load_cpu_seconds": load,
        "peak": peak - start,
        "loaded": after - start,
        "prefill": len(ids[: asked["prompt"]]) / prefill,
    }
    return found | ({"decoding": asked["steps"] / decoding} if asked["steps"] else {})


def _read(reader: Reader | LlamaCpp, prompt: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """CPU-seconds of the prompt, and of the steps after it, one token at a time."""
    began = time.process_time()
    reader.read(prompt)
    middle = time.process_time()
    for at in range(len(steps)):
        reader.read(steps[at : at + 1])
    return middle - began, time.process_time() - middle


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
