#!/usr/bin/env python
"""What a model takes to load and to run, beside what others would use instead. SmolLM2-135M.

    scripts/fetch_material smollm2
    scripts/bench_speed.py [--recipes llm-2bit llm-4bit] [DIR…] [--repeats 5] [--threads 1]

Rows: the float32 export; our recipes, written with random codes, since neither speed nor memory depends on them, or
finished artifacts; onnxruntime-genai's builder's int4, made once in the cache; llama.cpp's Q2_K and Q4_0, made by it
of the same GGUF file (npm's `@node-llama-cpp/linux-x64`; scripts/llama_cpp.py). Each is opened in a process of its
own that has no torch, all in turn, so that a busy machine slows all alike; medians count. A prompt of 256 tokens,
then 160 single ones, in a plain loop in Python. Tokens are per second of CPU time. Memory is the most that was
resident, mapped pages included, less what the process held after its imports. A second table is a prompt of 2,048
tokens: read at once with all its logits, and as `compress generate` reads it. Results go to docs/measured/speed.json.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from bench_loading import write_artifact
from llama_cpp import Unavailable, quantized
from llama_cpp import version as llama_cpp_version
from material import ROOT, cache, model_dir
from measured import cached, markdown, number, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.artifact import Artifact
from compressor.core.machine import processor
from compressor.evaluate.bench import size
from compressor.evaluate.original import export_original
from compressor.runtime.processes import clean_environment, python

RECIPES = ("llm-2bit", "llm-2bit-lean", "llm-4bit", "llm-4bit-lean")
LLAMA_CPP = ("Q2_K", "Q4_0")
ORIGINAL, INT4 = "original, float32", "onnxruntime-genai's builder, int4"
PROMPT, STEPS, LONG = 256, 160, 2048
AT_ONCE, IN_PIECES = "at once, all logits", "in pieces, the last logits"


@dataclass(frozen=True)
class Row:
    """A model to measure: `kind` is as `speed_process.measure` has it; `shared`: its cache may be written in place."""

    path: Path
    nbytes: int
    kind: str = "artifact"
    shared: bool = False


def built_int4(source: Path) -> Row:
    """The builder's model.

    Raises:
        Unavailable: It cannot be built here.
    """
    target = cache() / "genai_int4"
    if not (target / "model.onnx").is_file():
        if importlib.util.find_spec("onnxruntime_genai") is None:
            raise Unavailable("onnxruntime-genai is not installed; pip install compressor[genai]")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target),
                   "-p", "int4", "-e", "cpu", "-c", str(cached("builder"))]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(target, ignore_errors=True)
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise Unavailable(f"the builder failed: {last[0] if last else done.returncode}")
    search = json.loads((target / "genai_config.json").read_text(encoding="utf-8"))["search"]
    return Row(target, size(target)["bytes"], shared=search["past_present_share_buffer"])


def rows_of(recipes: list[str], directories: list[Path], scratch: Path) -> tuple[dict[str, Row], dict[str, str]]:
    """All that is to be measured, and what cannot be, with the reason."""
    source, rows, skipped = model_dir("smollm2"), dict[str, Row](), dict[str, str]()
    checkpoint = open_checkpoint(source)
    (scratch / "original").mkdir()
    export_original(checkpoint, scratch / "original", [{"input_ids": torch.zeros(1, 8, dtype=torch.long)}])
    checkpoint.write_tokenizer(scratch / "original")
    rows[ORIGINAL] = Row(scratch / "original", size(scratch / "original")["bytes"])
    for recipe in recipes:
        (scratch / recipe).mkdir()
        write_artifact(checkpoint, recipe, scratch / recipe)
        rows[recipe] = Row(scratch / recipe, size(scratch / recipe)["bytes"])
    for path in directories:
        rows[Artifact.open(path).report["recipe"]["name"]] = Row(path, size(path)["bytes"])
    try:
        rows[INT4] = built_int4(source)
    except Unavailable as reason:
        skipped[INT4] = str(reason)
    for kind in LLAMA_CPP:
        try:
            path = quantized(model_dir("smollm2-gguf"), kind)
            rows[f"llama.cpp {kind}"] = Row(path, path.stat().st_size, "llama.cpp")
        except Unavailable as reason:
            skipped[f"llama.cpp {kind}"] = str(reason)
    return rows, skipped


def measured(row: Row, config: dict[str, Any], threads: int, **asked: Any) -> dict[str, float]:
    """One process of `speed_process`."""
    settings = {"path": str(row.path), "kind": row.kind, "shared": row.shared, "threads": threads, "config": config}
    command = python(str(ROOT / "scripts" / "speed_process.py"), json.dumps(settings | asked))
    environment = clean_environment(PYTHONPATH=f"{ROOT}:{ROOT / 'scripts'}")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def speed_table(results: dict[str, Any]) -> str:
    """What each model takes, and how fast it is."""
    rows: list[list[object]] = []
    for name, found in results["models"].items():
        rows.append([
            name, number(found["megabytes"]), f"{found['load_cpu_seconds']:.2f}", f"{found['peak'] / 1e6:.0f}",
            f"{found['decoding']:.0f}", number(found["prefill"], 0),
        ])  # fmt: skip
    titles = ["model", "MB, all files", "load, CPU-s", "peak memory, MB", "decoding", "prefill"]
    notes = [f"{name}: not measured, {reason}" for name, reason in results["skipped"].items()]
    return "\n\n".join([markdown(titles, rows), *notes])


def prompt_table(results: dict[str, Any]) -> str:
    """A long prompt, before and after."""
    rows = [
        [f"{name}, {how}", f"{LONG / found['prefill']:.2f} s", f"{found['peak'] / 1e6:.0f} MB"]
        for name, ways in results["long_prompt"].items()
        for how, found in ways.items()
    ]
    return markdown([f"a prompt of {LONG:,} tokens", "CPU time", "peak memory"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, help="finished artifacts")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = json.loads((model_dir("smollm2") / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=cached("speed")) as scratch:
        rows, skipped = rows_of(arguments.recipes, arguments.directories, Path(scratch))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
        for repeat in range(arguments.repeats):
            for name, row in rows.items():
                found = measured(row, config, arguments.threads, prompt=PROMPT, steps=STEPS, warm=True)
                runs[name].append(found)
                print(repeat, name, json.dumps(found), flush=True)
        ways = {AT_ONCE: "plain", IN_PIECES: "artifact"}
        long_prompt = {
            recipe: {
                how: medians([
                    measured(Row(rows[recipe].path, 0, kind), config, arguments.threads, prompt=LONG, steps=0,
                             warm=False)
                    for _ in range(arguments.repeats)
                ])
                for how, kind in ways.items()
            }
            for recipe in arguments.recipes[:1]
        }  # fmt: skip
        results = {
            "model": "SmolLM2-135M", "onnxruntime": onnxruntime.__version__, "processor": processor(),
            "threads": arguments.threads, "repeats": arguments.repeats, "skipped": skipped,
            "models": {name: {"megabytes": rows[name].nbytes / 1e6} | medians(found) for name, found in runs.items()},
            "long_prompt": long_prompt,
        } | ({} if skipped else {"llama_cpp": llama_cpp_version()})  # fmt: skip
    write_results("speed", results)
    print(speed_table(results), prompt_table(results), sep="\n\n")
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
