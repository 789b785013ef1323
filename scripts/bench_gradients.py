#!/usr/bin/env python
"""Peak memory of the streamed gradients of random Llamas with 12 and 24 blocks: it should not grow with their number.

    scripts/bench_gradients.py [--layers 12 24] [--threads 1]

Width 1024, intermediate 2816, 16 heads of which 4 for keys and values, vocabulary 8192, float32: 11.3 M weights in a
block. Gradients of every linear over 8 sequences of 256 tokens, in a process of its own whose anonymous memory is
sampled every 10 ms; "before" is what it held when the imports were done and the network was built without weights.
Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import cached, markdown, read_results, write_results

from compressor.core.machine import private_memory

WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 1024, 2816, 16, 4, 8192
SEQUENCES, WINDOW = 8, 256
SAMPLED_EVERY = 0.01


def make_model(n_layers: int) -> Path:
    """A random Llama's directory; made at the first call."""
    import torch
    import transformers

    target = cached("gradients") / f"random-llama-{n_layers}"
    if not target.is_dir():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=n_layers, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY, tie_word_embeddings=True,
        )  # fmt: skip
        partial = target.with_suffix(".partial")
        transformers.LlamaForCausalLM(config).save_pretrained(partial)
        partial.rename(target)
    return target


def gather(directory: Path) -> None:
    """What is measured; says when it begins and how it ended."""
    import torch

    from compressor.checkpoints import open_checkpoint
    from compressor.sweeps.gradients import GradientFiles, gather_gradients
    from compressor.sweeps.network import Network

    network = Network(open_checkpoint(directory))
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, VOCABULARY, (SEQUENCES, WINDOW), generator=generator)}]
    print("ready", flush=True)
    time.sleep(5 * SAMPLED_EVERY)
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        gather_gradients(network, batches, GradientFiles(Path(scratch), 1), generator)
    print(time.process_time() - began, flush=True)


def watch(n_layers: int, threads: int) -> dict[str, Any]:
    """Peak bytes, and CPU-seconds, of one network."""
    directory = make_model(n_layers)
    process = subprocess.Popen(
        [sys.executable, __file__, "--gather", str(directory)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    before = peak = private_memory(process.pid) or 0
    while process.poll() is None:
        peak = max(peak, private_memory(process.pid) or 0)
        time.sleep(SAMPLED_EVERY)
    if process.returncode:
        sys.exit(f"bench_gradients: gathering ended with status {process.returncode}")
    return {"before": before, "peak": peak, "cpu_seconds": round(float(process.stdout.read()), 1)}


def gradients_table(results: dict[str, Any]) -> str:
    """A row per network."""
    rows = [
        [name, *(f"{entry[key] / 1e6:.0f} MB" for key in ("before", "peak")), f"{entry['cpu_seconds']:.0f}"]
        for name, entry in results.items()
    ]
    return markdown(["blocks", "before", "peak", "CPU-seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gather", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gather:
        gather(arguments.gather)
        return
    results = read_results("gradients")
    for n_layers in arguments.layers:
        results[str(n_layers)] = watch(n_layers, arguments.threads)
        write_results("gradients", results)
    print(gradients_table(results))
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
