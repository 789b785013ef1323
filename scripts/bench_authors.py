#!/usr/bin/env python
"""How fast a traced decoder is beside the graph written by hand: SmolLM2-135M, with random codes.

    scripts/fetch_material smollm2
    scripts/bench_authors.py [--recipe llm-4bit-lean] [--repeats 5] [--threads 1]

The same weights get both graphs: that of `export/decoder.py`, and the one that any other architecture gets
(`export/causal.py`). Each reads prompts of 128 and 512 tokens, then 64 single ones, in a process of its own and in
turn. Results go to docs/measured/authors.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
from bench_loading import write_artifact
from bench_speed import Row, measured, medians
from material import model_dir
from measured import cached, markdown, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.machine import processor
from compressor.export import writing

PROMPTS, STEPS = (128, 512), 64
BY_HAND, TRACED = "written by hand", "traced"


def write_both(recipe: str, scratch: Path) -> dict[str, Row]:
    """An artifact by each author."""
    source, rows = model_dir("smollm2"), {}
    for author, refusal in ((BY_HAND, None), (TRACED, "traced, to be compared")):
        (scratch / author).mkdir()
        began = time.process_time()
        with mock.patch.object(writing, "decoder_refusal", lambda config, refusal=refusal: refusal):
            write_artifact(open_checkpoint(source), recipe, scratch / author)
        print(f"{author}: {time.process_time() - began:.1f} CPU-s", flush=True)
        rows[author] = Row(scratch / author, 0)
    return rows


def authors_table(results: dict[str, Any]) -> str:
    """Tokens per CPU-second of both, and the ratio."""
    rows: list[list[object]] = []
    for prompt, found in results["prompts"].items():
        for what in ("prefill", "decoding"):
            hand, traced = (found[author][what] for author in (BY_HAND, TRACED))
            does = f"{prompt} tokens at once" if what == "prefill" else f"one token after {prompt}"
            rows.append([does, f"{hand:.0f}", f"{traced:.0f}", f"{traced / hand:.2f} ×"])
    return markdown(["", BY_HAND, TRACED, "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llm-4bit-lean")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = json.loads((model_dir("smollm2") / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=cached("authors")) as scratch:
        rows = write_both(arguments.recipe, Path(scratch))
        runs: dict[str, dict[str, list[dict[str, float]]]] = {
            str(prompt): {author: [] for author in rows} for prompt in PROMPTS
        }
        for repeat in range(arguments.repeats):
            for prompt in PROMPTS:
                for author, row in rows.items():
                    found = measured(row, config, arguments.threads, prompt=prompt, steps=STEPS, warm=True)
                    runs[str(prompt)][author].append(found)
                    print(repeat, prompt, author, json.dumps(found), flush=True)
    results = {
        "model": "SmolLM2-135M", "recipe": arguments.recipe, "onnxruntime": onnxruntime.__version__,
        "processor": processor(), "threads": arguments.threads, "repeats": arguments.repeats,
        "prompts": {
            prompt: {author: medians(found) for author, found in each.items()} for prompt, each in runs.items()
        },
    }  # fmt: skip
    write_results("authors", results)
    print(authors_table(results))
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
