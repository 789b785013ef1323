#!/usr/bin/env python
"""How much CPU time onnxruntime takes to load an artifact, and with how much memory: SmolLM2 in the recipes' encodings.

    scripts/fetch_material smollm2
    scripts/bench_loading.py [--recipes llm-2bit llm-3bit] [--label "as written"] [--threads 1]

Codes and codewords are random: loading does not depend on them, and nothing needs to be compressed. Each artifact is
opened in a process of its own, three times; the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from material import model_dir
from measured import markdown, read_results, write_results

from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.core.encoding import Layout, restore
from compressor.core.spec import DenseSpec
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.evaluate.bench import bench
from compressor.export.writing import export_graph
from compressor.plan.plan import PlannedTensor
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe

RECIPES = ("llm-2bit", "llm-3bit", "llm-4bit")
REPEATS = 3


def random_tensor(tensor: PlannedTensor, generator: torch.Generator) -> EncodedTensor:
    """A tensor in its planned encoding, of random codes and codewords; what is stored in floats is 0.01."""
    parts = {}
    for name, (dtype, shape) in tensor.spec.parts(*tensor.matrix).items():
        if dtype in ("F16", "F32"):
            parts[name] = torch.full(shape, 0.01, dtype=torch.float16 if dtype == "F16" else torch.float32)
        else:
            parts[name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    layout = Layout(tensor.shape, tensor.transposed and not isinstance(tensor.spec, DenseSpec))
    return EncodedTensor(restore(tensor.describe(), parts), layout)


def write_artifact(checkpoint: Checkpoint, recipe: str, directory: Path) -> None:
    """Weights, graph and configuration of a recipe's artifact."""
    plan = make_plan(checkpoint, load_recipe(recipe, []))
    generator = torch.Generator().manual_seed(0)
    tensors = {tensor.name: random_tensor(tensor, generator) for tensor in plan.tensors}
    write_tensors(directory / "model.safetensors", tensors, checkpoint.tied)
    (directory / "config.json").write_text(json.dumps(checkpoint.config))
    export_graph(checkpoint, EncodedTensors([directory / "model.safetensors"]), directory, "default", False, [])


def measure(directory: Path, threads: int) -> dict[str, Any]:
    """Medians of time and memory; bytes of the graph and the weights."""
    runs = [bench(directory, threads, new=4, prefill=16, repeats=1) for _ in range(REPEATS)]
    return {
        "load_cpu_seconds": statistics.median(run["load_cpu_seconds"] for run in runs),
        "peak": statistics.median(run["memory"]["peak_private"] for run in runs),
        "loaded": statistics.median(run["memory"]["loaded"]["private"] for run in runs),
        "graph_bytes": (directory / "model.onnx").stat().st_size,
        "weight_bytes": (directory / "model.safetensors").stat().st_size,
    }


def loading_table(results: dict[str, Any]) -> str:
    """A row per recipe and way of writing it."""
    rows = [
        [f"{recipe}, {label}", f"{found['load_cpu_seconds']:.1f} s", f"{found['peak'] / 1e9:.2f} GB",
         f"{found['loaded'] / 1e9:.2f} GB", f"{found['graph_bytes'] / 1e6:.2f} MB"]
        for recipe, labels in results.items()
        for label, found in labels.items()
    ]  # fmt: skip
    return markdown(["SmolLM2-135M", "load, CPU", "peak", "after", "graph"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--label", default="as written")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(model_dir("smollm2"))
    results = read_results("loading")
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            write_artifact(checkpoint, recipe, Path(scratch))
            results.setdefault(recipe, {})[arguments.label] = measure(Path(scratch), arguments.threads)
        print(loading_table({recipe: results[recipe]}), flush=True)
    write_results("loading", results)
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
