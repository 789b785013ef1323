#!/usr/bin/env python
"""How much CPU time onnxruntime takes to load an artifact, and with how much memory: SmolLM2 in the recipes' encodings.

    scripts/fetch_material smollm2
    scripts/bench_loading.py [--recipes llm-2bit llm-3bit] [--threads 1]
    scripts/bench_loading.py --planned [--cases llm-2bit …]        memory as `--dry-run` plans it, and as it is

Codes and codewords are random: loading does not depend on them, and nothing needs to be compressed. Each artifact is
loaded as it is written, folded in stages; folded at once; and unfolded by `compress install`. Each is opened in a
process of its own, five times; medians count. Memory is what opening adds to the resident memory of the process, at
most and after. The three must give the same logits to the bit.

With --planned artifacts of several recipes and sources, as they are written, are opened and run once each, in a process
of their own: a text of 512 tokens, or one example. The Llama of 1.1 B parameters is of zeros, which its codes are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_memory import CONFIG, LAYERS, shapes, write_tokenizer
from material import model_dir
from measured import cached, markdown, read_results, write_results
from strangers import STRANGERS, fetch, files_of

from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.core.artifact import INSTALLED, REPORT
from compressor.core.encoding import Layout, restore
from compressor.core.options import RunOptions
from compressor.core.spec import DenseSpec
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.data.arrays import Arrays
from compressor.evaluate.bench import bench
from compressor.evaluate.installation import install
from compressor.evaluate.session import GRAPH, DecoderSession
from compressor.export import staging
from compressor.export.writing import export_graph
from compressor.plan.plan import PlannedTensor
from compressor.plan.planning import make_plan
from compressor.plan.recipe import MEASURED_TEXT
from compressor.plan.recipe_file import load_recipe
from compressor.run.prepare import prepare

RECIPES = ("llm-2bit", "llm-3bit", "llm-4bit")
REPEATS = 5
AT_ONCE, STAGED, UNFOLDED = "folded at once", "as written, folded in stages", "unfolded by `compress install`"


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


def as_it_is(checkpoint: Checkpoint, tensor: PlannedTensor) -> EncodedTensor:
    """A tensor that a plan leaves alone."""
    values = checkpoint.read(tensor.name)
    kind = torch.float16 if isinstance(tensor.spec, DenseSpec) and tensor.spec.dtype == "F16" else torch.float32
    return EncodedTensor.dense(values, kind if values.is_floating_point() else values.dtype)


def write_artifact(checkpoint: Checkpoint, recipe: str, directory: Path, settings: Sequence[str] = ()) -> None:
    """All that running a recipe's artifact needs, of random codes."""
    plan = make_plan(checkpoint, load_recipe(recipe, list(settings)))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        tensor.name: random_tensor(tensor, generator) if tensor.by else as_it_is(checkpoint, tensor)
        for tensor in plan.tensors
    }
    write_tensors(directory / "model.safetensors", tensors, checkpoint.tied)
    if checkpoint.config is not None:
        (directory / "config.json").write_text(json.dumps(checkpoint.config))
        checkpoint.write_tokenizer(directory)
    export_graph(checkpoint, EncodedTensors([directory / "model.safetensors"]), directory, "default", False, [])
    (directory / REPORT).write_text("{}")


def folded_at_once(checkpoint: Checkpoint, directory: Path) -> Path:
    """The graph without stages of an artifact's weights, in `directory`/at_once."""
    at_once = directory / "at_once"
    at_once.mkdir()
    (at_once / "model.safetensors").hardlink_to(directory / "model.safetensors")
    (at_once / "config.json").write_text(json.dumps(checkpoint.config))
    stored = EncodedTensors([at_once / "model.safetensors"])
    with mock.patch.object(staging, "WORTH_IT", 1 << 62):
        return export_graph(checkpoint, stored, at_once, "default", False, [])


def measure(graph: Path, threads: int) -> dict[str, Any]:
    """Medians of time and memory; bytes of the graph and of what lies beside it."""
    runs = [bench(graph, threads, new=4, prefill=16, repeats=1) for _ in range(REPEATS)]
    data = INSTALLED[-1] if graph.name in INSTALLED else "model.safetensors"
    return {
        "load_cpu_seconds": statistics.median(run["load_cpu_seconds"] for run in runs),
        "peak": statistics.median(run["memory"]["loading"]["peak"] for run in runs),
        "loaded": statistics.median(run["memory"]["loading"]["after"] for run in runs),
        "graph_bytes": graph.stat().st_size,
        "weight_bytes": (graph.parent / data).stat().st_size,
    }


def logits(graph: Path) -> np.ndarray:
    """Of some tokens."""
    return DecoderSession(graph, threads=1, apart=True).logits(np.arange(7)[None] * 911)


def measure_recipe(checkpoint: Checkpoint, recipe: str, threads: int) -> dict[str, Any]:
    """Each way of loading a recipe's artifact.

    Raises:
        AssertionError: They do not compute the same.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_artifact(checkpoint, recipe, directory)
        install(directory)
        graphs = {
            AT_ONCE: folded_at_once(checkpoint, directory),
            STAGED: directory / GRAPH,
            UNFOLDED: directory / INSTALLED[1],
        }
        expected = logits(graphs[AT_ONCE])
        for graph in graphs.values():
            np.testing.assert_array_equal(logits(graph), expected)
        return {label: measure(graph, threads) for label, graph in graphs.items()}


def loading_table(results: dict[str, Any]) -> str:
    """A row per recipe and way of loading it."""
    rows = [
        [f"{recipe}, {label}", f"{found['load_cpu_seconds']:.2f} s", f"{found['peak'] / 1e6:.0f} MB",
         f"{found['loaded'] / 1e6:.0f} MB", f"{found['graph_bytes'] / 1e6:.2f} MB",
         f"{found['weight_bytes'] / 1e6:.1f} MB"]
        for recipe, labels in results.items()
        for label, found in labels.items()
    ]  # fmt: skip
    return markdown(["SmolLM2-135M", "load, CPU", "peak", "after", "graph", "weights"], rows)


@dataclass(frozen=True)
class Case:
    """What memory is planned and measured of: a source as MODELS or STRANGERS know it, and a recipe."""

    source: str
    recipe: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.what}, {self.recipe}"

    def options(self) -> RunOptions:
        """The run whose plan counts."""
        if self.source == LARGE:
            return RunOptions(str(sparse_llama()), self.recipe)
        if self.source in STRANGERS:
            data = files_of(self.source)["calibration"]
            return RunOptions(str(fetch(self.source)), self.recipe, data=str(data))
        return RunOptions(str(model_dir(self.source)), self.recipe)


LARGE = "llama-1.1b"
CASES = (
    *(Case("smollm2", recipe, "SmolLM2-135M") for recipe in (*RECIPES, "llm-2bit-lean", "llm-4bit-lean")),
    Case(LARGE, "llm-2bit-fast", "Llama, 1.1 B"),
    Case("minilm", "encoder-4bit", "MiniLM, BERT of 22 M"),
    Case("nsfw", "cnn-4bit", "ResNet-50, ONNX"),
    Case("ocr-read", "cnn-4bit", "PP-OCRv4, ONNX"),
)


def sparse_llama() -> Path:
    """A Llama of bench_memory's sizes whose weights are a hole in a file: nothing is written, zeros are read."""
    target = cached("loading") / "sparse-llama"
    if target.is_dir():
        return target
    partial = target.with_name("partial")
    partial.mkdir()
    header, position = {}, 0
    for name, shape in shapes(LAYERS).items():
        n_bytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + n_bytes]}
        position += n_bytes
    text = json.dumps(header).encode()
    with (partial / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
    (partial / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": LAYERS}, indent=1))
    write_tokenizer(model_dir("smollm2"), partial)
    partial.rename(target)
    return target


def measure_case(case: Case, threads: int) -> dict[str, Any]:
    """Planned and measured bytes of an artifact of random codes."""
    start = prepare(case.options())
    planned = start.plan.in_use
    assert planned is not None
    calibration, shapes = start.samples.calibration if start.load else None, {}
    if isinstance(calibration, Arrays):
        shapes = {name: [1, *array.shape[1:]] for name, array in next(calibration.batches(1)).items() if array.ndim}
    with tempfile.TemporaryDirectory() as scratch:
        write_artifact(start.checkpoint, case.recipe, Path(scratch))
        memory = bench(scratch, threads, new=4, prefill=MEASURED_TEXT, repeats=1, shapes=shapes)["memory"]
    tokens = MEASURED_TEXT if planned.per_thousand_tokens else 0
    return {
        "loading": [planned.loading, memory["loading"]["peak"]],
        "loaded": [planned.loaded, memory["loading"]["after"]],
        "most": [planned.most(tokens), memory["running"]["peak"]],
        "per_thousand_tokens": [planned.per_thousand_tokens, memory["running"].get("per_thousand_tokens")],
    }


def in_use_table(results: dict[str, Any]) -> str:
    """Planned, measured, and how far apart."""

    def told(planned: int, measured: int | None) -> str:
        if not planned or not measured:
            return ""
        return f"{planned / 1e6:,.0f} / {measured / 1e6:,.0f} MB, {planned / measured - 1:+.0%}"

    rows = [
        [name, *(told(*found[key]) for key in ("loading", "loaded", "most", "per_thousand_tokens"))]
        for name, found in results.items()
    ]
    return markdown(
        ["planned / measured", "peak of loading", "loaded", "loading and running", "1,000 tokens of context"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--planned", action="store_true", help="memory as it is planned, and as it is")
    parser.add_argument("--cases", nargs="*", help="of --planned: recipes and sources whose names hold one of these")
    arguments = parser.parse_args()
    if arguments.planned:
        found = read_results("in_use")
        for case in CASES:
            if not arguments.cases or any(word in case.name for word in arguments.cases):
                found[case.name] = measure_case(case, arguments.threads)
                print(in_use_table({case.name: found[case.name]}), flush=True)
                write_results("in_use", {each.name: found[each.name] for each in CASES if each.name in found})
        return made_tables()
    checkpoint = open_checkpoint(model_dir("smollm2"))
    results = read_results("loading")
    for recipe in arguments.recipes:
        results[recipe] = measure_recipe(checkpoint, recipe, arguments.threads)
        print(loading_table({recipe: results[recipe]}), flush=True)
    write_results("loading", results)
    made_tables()


def made_tables() -> None:
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
