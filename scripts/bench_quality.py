#!/usr/bin/env python
"""Perplexity of artifacts, of the usual methods at the same sizes, and of each step of our method. SmolLM2-135M.

    scripts/fetch_material smollm2 moby sotu policy foldoc spam
    scripts/bench_quality.py artifacts DIR…                 finished artifacts, in onnxruntime
    scripts/bench_quality.py others                         onnxruntime-genai's builder, and llama.cpp
    scripts/bench_quality.py baselines --bits 2 3           round-to-nearest, HQQ and GPTQ, in torch
    scripts/bench_quality.py steps                          a row per step of jlcm at 2.5 bits

Windows of 512 tokens, nothing before them, as SmolLM2's tokenizer has it, 511 predictions each: 8 windows of two
excerpts (the published protocol) and 64 of the whole texts; of artifacts 8 of texts of other kinds as well
(scripts/material.py says which). Results go to docs/measured after each finished row; rows that are there are not
measured again, unless by --again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from material import model_dir
from measured import KINDS, PROTOCOL, SETS, cached, markdown, number, read_results, set_windows, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.artifact import Artifact
from compressor.core.tensors import EncodedTensors
from compressor.evaluate.bench import size
from compressor.evaluate.language import Sums, evaluate_language
from compressor.evaluate.reference import original_logits
from compressor.evaluate.session import DecoderSession

MODEL = "smollm2"
TITLES = {"moby": "Moby Dick", "sotu": "State of the Union"}
SIX = {"sotu_8": "speeches", "moby_8": "novel", "policy_8": "documentation", "foldoc_8": "dictionary",
       "mail_8": "mail", "code_8": "code"}  # fmt: skip
"""Set of windows -> the kind of text that it is."""
UNTIMED = ("export", "evaluation", "benchmark")
STEP_RECIPE = """
name: steps
passes: [{pass: jlcm, width: 10, dim: 4, group: 64, scale_bits: 8}]
calibration: {tokens: 16384, window: 512}
embeddings: {bits: 3, group: 64, zero: learned, scale_bits: 8, sweeps: 4, ridge: 0.3, refined: 2048}
distill: {tokens: 98304}
evaluation: {window: 512}
"""
START = {
    "jlcm.feedback": "false", "jlcm.kmeans_iterations": "0", "jlcm.codebooks": "1", "jlcm.block_steps": "0",
    "jlcm.descent_rounds": "0", "distill.steps": "0", "distill.mapping_rate": "0.0",
    "calibration.token_importance": "false", "evaluation.tokens": "0",
}  # fmt: skip
STEPS: dict[str, tuple[str | None, dict[str, str]]] = {
    "nearest codeword of the Gaussian codebook": (None, START),
    "weighted k-means": ("nearest codeword of the Gaussian codebook", {"jlcm.kmeans_iterations": "4"}),
    "error feedback": ("weighted k-means", {"jlcm.feedback": "true"}),
    "token importance": ("error feedback", {"calibration.token_importance": "true"}),
    "coordinate descent, 2 rounds": ("token importance", {"jlcm.descent_rounds": "2"}),
    "drift, half a step": ("coordinate descent, 2 rounds", {"calibration.drift": "0.5"}),
    "row clusters, 4 codebooks": ("coordinate descent, 2 rounds", {"jlcm.codebooks": "4"}),
    "block reconstruction, 8 steps": ("coordinate descent, 2 rounds", {"jlcm.block_steps": "8"}),
    "distillation, 16 steps": ("coordinate descent, 2 rounds", {"distill.steps": "16"}),
    "distillation, 64 steps": ("coordinate descent, 2 rounds", {"distill.steps": "64"}),
    "proximal mapping moves, rate 0.002": ("distillation, 64 steps", {"distill.mapping_rate": "0.002"}),
}
"""Row -> the row that it is added to, and the settings that it changes."""


def original(
    model: str = MODEL, tokenizer: Path | None = None, sets: Iterable[str] = (*SETS, *KINDS)
) -> dict[str, float]:
    """Perplexities of the float32 original, measured once per checkpoint and cached."""
    checkpoint = open_checkpoint(model_dir(model))
    file = cached("original") / f"{checkpoint.digest()[:12]}.json"
    found: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    for name in sets:
        if name in found:
            continue
        windows, sums = set_windows(name, tokenizer), Sums()
        for window, logits in zip(windows, original_logits(checkpoint, windows), strict=True):
            sums.add(logits[0, :-1], None, window[1:])
        found[name] = math.exp(sums.loss / sums.tokens)
        file.write_text(json.dumps(found))
    return found


def perplexities(
    directory: Path, sets: Iterable[str], threads: int | None, tokenizer: Path | None = None
) -> dict[str, float]:
    """Of an artifact, in onnxruntime as it is shipped."""
    session = DecoderSession(directory, threads)
    return {name: evaluate_language(session, None, set_windows(name, tokenizer)).perplexity for name in sets}


def bits_per_weight(directory: Path) -> float:
    """Of the linears, scales and codebooks counted; tables left out."""
    tensors = EncodedTensors([directory / "model.safetensors"])
    layers = [
        tensor.encoding for name, tensor in tensors.items()
        if tensor.encoding.kind != "dense" and "embed" not in name and "head" not in name
    ]  # fmt: skip
    return 8 * sum(layer.nbytes for layer in layers) / sum(math.prod(layer.shape) for layer in layers)


def measure_artifacts(arguments: argparse.Namespace) -> None:
    results = read_results("quality")
    results |= {"model": "SmolLM2-135M", "original": {"megabytes": 538.1, "perplexity": original()}}
    found = results.setdefault("artifacts", {})
    for directory in map(Path, arguments.directories):
        report = Artifact.open(directory).report
        name = report["recipe"]["name"]
        found[name] = {
            "megabytes": size(directory)["bytes"] / 1e6,
            "bits_per_weight": round(bits_per_weight(directory), 3),
            "cpu_seconds": total_cpu_seconds(report["cost"]),
            "perplexity": _kept(found.get(name), report) | perplexities(directory, arguments.sets, arguments.threads),
            "sha256": report["sha256"]["model.safetensors"],
        }
        write_results("quality", results)
        print(f"{name}: {found[name]}", flush=True)
    write_results("quality", results)
    print(quality_table(results))


def _kept(entry: dict[str, Any] | None, report: dict[str, Any]) -> dict[str, float]:
    """What was measured of the very same weights before."""
    same = entry is not None and entry["sha256"] == report["sha256"]["model.safetensors"]
    return entry["perplexity"] if entry is not None and same else {}


def total_cpu_seconds(cost: dict[str, dict[str, float]]) -> float:
    return round(sum(stage["cpu_seconds"] for name, stage in cost.items() if name not in UNTIMED), 1)


def quality_table(results: dict[str, Any]) -> str:
    """Artifacts beside the original, smallest last."""
    reference = results["original"]["perplexity"]
    figures = [number(reference[name]) for name in SETS]
    rows: list[list[object]] = [["original, float32", "538.1", 32, *figures, "1.00", None]]
    for name, entry in sorted(results.get("artifacts", {}).items(), key=lambda item: -item[1]["megabytes"]):
        found = entry["perplexity"]
        rows.append([
            f"`{name}`", number(entry["megabytes"]), f"{entry['bits_per_weight']:.2f}",
            *(number(found.get(key)) for key in SETS), f"{found['moby_8'] / reference['moby_8']:.2f}",
            number(entry["cpu_seconds"], 0),
        ])  # fmt: skip
    columns = ["recipe", "MB, all files", "bits per weight", *map(_title, SETS), "× original", "CPU-seconds"]
    return markdown(columns, rows)


def kinds_table(results: dict[str, Any]) -> str:
    """How many times the original's perplexity artifacts have on texts of six kinds, 8 windows each."""
    reference = results["original"]["perplexity"]
    rows: list[list[object]] = [["original, its perplexity", *(number(reference.get(key)) for key in SIX), None]]
    for name, entry in sorted(results.get("artifacts", {}).items(), key=lambda item: -item[1]["megabytes"]):
        found = entry["perplexity"]
        if not all(key in found for key in SIX):
            continue
        ratios = [found[key] / reference[key] for key in SIX]
        rows.append([f"`{name}`", *(f"{ratio:.2f} ×" for ratio in ratios), f"{max(ratios) / min(ratios):.2f}"])
    return markdown(["recipe", *SIX.values(), "worst by best"], rows)


def _title(name: str) -> str:
    text, n = SETS[name]
    return f"{TITLES[text]}, {n}"


def measure_others(arguments: argparse.Namespace) -> None:
    """What others would use instead, on the protocol's two excerpts; what cannot be run here keeps its figures."""
    from bench_speed import INT4, built_int4
    from llama_cpp import TYPES, LlamaCpp, Unavailable, quantized

    results = read_results("quality")
    found = results.setdefault("others", {})
    source = model_dir(MODEL)
    try:
        row = built_int4(source)
        session = DecoderSession(row.path, 1)
        session.config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        found[INT4] = {"megabytes": row.nbytes / 1e6, "perplexity": {
            name: evaluate_language(session, None, set_windows(name)).perplexity for name in PROTOCOL}}  # fmt: skip
        for kind in TYPES:
            path, figures = quantized(model_dir(f"{MODEL}-gguf"), kind), {}
            model = LlamaCpp(path, 512)
            for name in PROTOCOL:
                figures[name] = perplexity_there(model, set_windows(name))
            found[f"llama.cpp {kind}"] = {"megabytes": path.stat().st_size / 1e6, "perplexity": figures}
            print(f"{kind}: {figures}", flush=True)
    except Unavailable as reason:
        print(reason)
    write_results("quality", results)


def perplexity_there(model: Any, windows: Iterable[np.ndarray]) -> float:
    """Of a LlamaCpp on windows (512,)."""
    sums = Sums()
    for window in windows:
        sums.add(model.logits(window)[:-1], None, window[1:])
    return math.exp(sums.loss / sums.tokens)


def measure_baselines(arguments: argparse.Namespace) -> None:
    from baselines import Bench, Setting, file_bytes, settings

    from compressor.plan.planning import make_plan

    bench = Bench(open_checkpoint(model_dir(MODEL)))
    results = read_results("baselines")
    families: dict[tuple, list[Setting]] = {}
    for setting in settings(arguments.bits, arguments.methods):
        families.setdefault(setting.family, []).append(setting)
    for members in families.values():
        for setting in members:
            if setting.name in results and not arguments.again:
                continue
            began = time.process_time()
            tensors = bench.encode(setting)
            plan = make_plan(bench.checkpoint, setting.recipe)
            results[setting.name] = {
                "method": setting.method, "bits": setting.bits, "group": setting.group, "zero": setting.zero,
                "megabytes": file_bytes(setting, plan) / 1e6, "cpu_seconds": round(time.process_time() - began, 1),
                "perplexity": {name: bench.perplexity(tensors, set_windows(name)) for name in PROTOCOL},
            }  # fmt: skip
            write_results("baselines", results)
            print(f"{setting.name}: {results[setting.name]}", flush=True)
    for members in families.values():
        best = min(members, key=lambda setting: _mean(results[setting.name]))
        figures = results[best.name]["perplexity"]
        missing = [name for name in SETS if name not in figures]
        tensors = bench.encode(best) if missing else None
        for name in missing:
            figures[name] = bench.perplexity(tensors, set_windows(name))
            write_results("baselines", results)
        for setting in members:
            shutil.rmtree(bench.work_folder(setting), ignore_errors=True)
    print(baselines_table(results))


def _mean(entry: dict[str, Any]) -> float:
    return math.prod(entry["perplexity"][name] for name in PROTOCOL)


def best_baselines(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each method, width and group the setting that did best on the very text that is reported."""
    families: dict[tuple, dict[str, Any]] = {}
    for entry in results.values():
        key = entry["bits"], -entry["group"], entry["method"]
        if key not in families or _mean(entry) < _mean(families[key]):
            families[key] = entry
    return [families[key] for key in sorted(families)]


def baselines_table(results: dict[str, Any]) -> str:
    """The best setting of each baseline."""
    rows = [
        [f"{entry['method'].upper()}, {entry['bits']} bits, groups of {entry['group']}, zero {entry['zero']}",
         number(entry["megabytes"]), *(number(entry["perplexity"].get(name)) for name in SETS)]
        for entry in best_baselines(results)
    ]  # fmt: skip
    return markdown(["method", "MB, all files", *map(_title, SETS)], rows)


def step_settings(row: str) -> dict[str, str]:
    """All settings of a row of STEPS."""
    before, changed = STEPS[row]
    return {**(step_settings(before) if before else {}), **changed}


def measure_steps(arguments: argparse.Namespace) -> None:
    from compressor.core.options import RunOptions
    from compressor.core.progress import make_progress
    from compressor.run.pipeline import run

    results, recipe = read_results("steps"), cached("steps") / "recipe.yaml"
    recipe.write_text(STEP_RECIPE, encoding="utf-8")
    for row in STEPS:
        if row in results and not arguments.again:
            continue
        target = cached("steps") / row.replace(",", "").replace(" ", "-")
        sets = tuple(f"{key}={value}" for key, value in step_settings(row).items())
        options = RunOptions(
            str(model_dir(MODEL)), str(recipe), target, sets=sets, force=True, progress=make_progress(silent=False)
        )
        report = run(options).report
        results[row] = {
            "added_to": STEPS[row][0], "megabytes": size(target)["bytes"] / 1e6,
            "cpu_seconds": total_cpu_seconds(report["cost"]),
            "perplexity": perplexities(target, PROTOCOL, arguments.threads),
        }  # fmt: skip
        write_results("steps", {name: results[name] for name in STEPS if name in results})
        print(f"{row}: {results[row]}", flush=True)
        shutil.rmtree(target)
    print(steps_table(results))


def steps_table(results: dict[str, Any]) -> str:
    """A row per step, and what it is added to."""
    rows = [
        [name, entry["added_to"], number(entry["megabytes"]), *(number(entry["perplexity"][key]) for key in PROTOCOL),
         number(entry["cpu_seconds"], 0)]
        for name, entry in results.items()
    ]  # fmt: skip
    return markdown(["step", "added to", "MB, all files", *map(_title, PROTOCOL), "CPU-seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    artifacts = commands.add_parser("artifacts", help="finished artifacts, in onnxruntime")
    artifacts.add_argument("directories", nargs="+")
    artifacts.add_argument("--threads", type=int)
    artifacts.add_argument("--sets", nargs="+", default=list(SETS | KINDS), choices=list(SETS | KINDS))
    artifacts.set_defaults(run=measure_artifacts)
    baselines = commands.add_parser("baselines", help="round-to-nearest, HQQ and GPTQ, in torch")
    baselines.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], choices=[2, 3, 4])
    baselines.add_argument("--methods", nargs="+", default=["gptq", "rtn", "hqq"], choices=["gptq", "rtn", "hqq"])
    baselines.add_argument("--again", action="store_true")
    baselines.set_defaults(run=measure_baselines)
    others = commands.add_parser("others", help="onnxruntime-genai's builder and llama.cpp")
    others.set_defaults(run=measure_others)
    steps = commands.add_parser("steps", help="a row per step of jlcm at 2.5 bits, in onnxruntime")
    steps.add_argument("--threads", type=int)
    steps.add_argument("--again", action="store_true")
    steps.set_defaults(run=measure_steps)
    arguments = parser.parse_args()
    arguments.run(arguments)
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
