#!/usr/bin/env python
"""Decoding speed of artifacts beside the float32 export and beside onnxruntime-genai's int4 model. SmolLM2-135M.

    scripts/fetch_material smollm2
    scripts/bench_speed.py DIR… [--threads 1 2] [--repeats 7] [--new 64]

All in plain onnxruntime with the same greedy loop and the same prompt, in one process: in each repeat every model
generates once, in turn, so that a busy machine slows all alike. Medians and ratios go to docs/measured/speed.json. The
int4 model is built by `python -m onnxruntime_genai.models.builder -p int4 -e cpu`, once, in the cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from material import cache, model_dir
from measured import cached, markdown, number, read_results, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.artifact import Artifact
from compressor.evaluate.bench_process import decode_seconds
from compressor.evaluate.original import export_original
from compressor.evaluate.session import DecoderSession

PROMPT = 16
ORIGINAL, INT4 = "original, float32", "onnxruntime-genai's builder, int4"


def built_int4(source: Path) -> tuple[Path | None, str]:
    """The builder's model, or None and the reason."""
    target = cache() / "genai_int4"
    if (target / "model.onnx").is_file():
        return target, ""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return None, "onnxruntime-genai is not installed; pip install compressor[genai]"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target),
               "-p", "int4", "-e", "cpu", "-c", str(cached("builder"))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and (target / "model.onnx").is_file():
        return target, ""
    shutil.rmtree(target, ignore_errors=True)
    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return None, f"the builder failed: {last[0] if last else done.returncode}"


def speeds(
    models: dict[str, Path], config: dict[str, Any], threads: int, repeats: int, new: int
) -> dict[str, float]:  # fmt: skip
    """Median tokens per second of each, after one round to warm up."""
    sessions = {name: DecoderSession(path, threads) for name, path in models.items()}
    for session in sessions.values():
        session.config = config  # the builder's folder has none of its own
    prompt = np.random.default_rng(0).integers(0, 32000, size=PROMPT)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, session in sessions.items():
            taken = decode_seconds(session, prompt, new)
            if repeat:
                seconds[name].append(taken)
    return {name: new / statistics.median(times) for name, times in seconds.items()}


def speed_table(results: dict[str, Any]) -> str:
    """Tokens per second by threads, and over the float32 export's."""
    counts = sorted(results["tokens_per_second"], key=int)
    rows = []
    for name in next(iter(results["tokens_per_second"].values())):
        cells: list[object] = [name]
        for count in counts:
            found = results["tokens_per_second"][count]
            cells += [number(found[name]), f"{found[name] / found[ORIGINAL]:.2f}"]
        rows.append(cells)
    titles = [
        title for n in counts for title in (f"tokens/s, {n} thread{'s' if n != '1' else ''}", "× float32")
    ]  # fmt: skip
    notes = [f"{name}: not measured, {reason}" for name, reason in results["skipped"].items()]
    return "\n\n".join([markdown(["model", *titles], rows), *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", help="artifacts")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new", type=int, default=64, help="tokens per repeat")
    arguments = parser.parse_args()
    source = model_dir("smollm2")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    artifacts = {Artifact.open(path).report["recipe"]["name"]: Path(path) for path in arguments.directories}
    int4, reason = built_int4(source)
    skipped = {} if int4 else {INT4: reason}
    with tempfile.TemporaryDirectory(dir=cached("speed")) as scratch:
        export_original(open_checkpoint(source), Path(scratch), [{"input_ids": torch.zeros(1, 8, dtype=torch.long)}])
        models = {ORIGINAL: Path(scratch)} | ({INT4: int4} if int4 else {}) | artifacts
        results = read_results("speed") | {
            "model": "SmolLM2-135M", "onnxruntime": onnxruntime.__version__, "new_tokens": arguments.new,
            "repeats": arguments.repeats, "skipped": skipped, "tokens_per_second": {},
        }  # fmt: skip
        for threads in arguments.threads:
            found = speeds(models, config, threads, arguments.repeats, arguments.new)
            results["tokens_per_second"][str(threads)] = found
            print(threads, json.dumps(found), flush=True)
    write_results("speed", results)
    print(speed_table(results))
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
