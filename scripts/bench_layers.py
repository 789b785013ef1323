#!/usr/bin/env python
"""What each step of jlcm and of trellis leaves of a layer's output error, on three blocks of SmolLM2-135M.

    scripts/fetch_material smollm2
    scripts/bench_layers.py

The error is tr(D·H·Dᵀ) / tr(W·H·Wᵀ), D = Ŵ − W, H the second moment of the layer's inputs in the float32 network over
8,192 tokens of the built-in sample, as a geometric mean over the 21 matrices. Nothing is learned beyond the layer.
Results go to docs/measured/layers.json.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from material import model_dir
from measured import markdown, number, write_results
from torch import Tensor

from compressor import data
from compressor.checkpoints import open_checkpoint
from compressor.core.contract import Statistics, WeightPass
from compressor.core.encoding import Codebook
from compressor.core.passes import Moves, Rates
from compressor.data.batches import calibration_batches
from compressor.graph.blocks import layers
from compressor.learning.learned import learnable
from compressor.passes.jlcm import Jlcm
from compressor.passes.trellis import Trellis
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.moments import layer_stages, second_moments
from compressor.sweeps.network import Network

BLOCKS = (5, 15, 25)
STEPS = 100
CODES: dict[str, Any] = {"width": 10, "dim": 4}
BARE: dict[str, Any] = {"kmeans_iterations": 0, "feedback": False, "descent_rounds": 0}


def learned(mapping_rate: float) -> Callable[[Tensor, Tensor, Codebook], Codebook]:
    """100 steps of Adam on the layer's output error: codewords, scales and, at a rate above 0, codes."""

    def learn(weight: Tensor, hessian: Tensor, start: Codebook) -> Codebook:
        matrix = learnable(start, Moves(mapping_rate, Jlcm().neighbours, Jlcm().delta))
        optimiser = torch.optim.Adam(matrix.parameter_groups(Rates(0.03, 0.01, 1e-3)), betas=(0.9, 0.95))
        initial = [group["lr"] for group in optimiser.param_groups]
        size = (weight @ hessian * weight).sum()
        for step in range(STEPS):
            for group, rate in zip(optimiser.param_groups, initial, strict=True):
                group["lr"] = rate * (1 - step / STEPS)
            found = matrix()
            (found * (2 * (found.detach() - weight) @ hessian / size)).sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            matrix.move()
        return matrix.result()

    return learn


Row = tuple[WeightPass, Callable[[Tensor, Tensor, Codebook], Codebook] | None]
FEEDBACK = Jlcm(**CODES, descent_rounds=0)
ROWS: dict[str, Row] = {
    "nearest codeword of the Gaussian codebook": (Jlcm(**CODES, **BARE), None),
    "weighted k-means": (Jlcm(**CODES, **(BARE | {"kmeans_iterations": 4})), None),
    "error feedback": (FEEDBACK, None),
    "the same, rows in 4 clusters with a codebook each": (FEEDBACK.model_copy(update={"codebooks": 4}), None),
    "then codewords and scales by gradient": (FEEDBACK, learned(0.0)),
    "then codes as well, proximal search, rate 0.002": (FEEDBACK, learned(0.002)),
    "then coordinate descent, 1 round": (Jlcm(**CODES, descent_rounds=1), None),
    "then coordinate descent, 2 rounds": (Jlcm(**CODES, descent_rounds=2), None),
    **{
        f"trellis, window of {window} bits, {rounds} rounds": (Trellis(window=window, descent_rounds=rounds), None)
        for window in (10, 12) for rounds in (0, 1, 2)
    },
}  # fmt: skip
"""All at 2.5 bits per weight."""


def matrices() -> Iterator[tuple[Tensor, Tensor]]:
    """Each linear of the blocks: its weight (out, in), and its inputs' second moment (in, in)."""
    checkpoint = open_checkpoint(model_dir("smollm2"))
    recipe = load_recipe("llm-2bit-fast")
    batches = calibration_batches(data.load(None, "calibration"), recipe, checkpoint.path, 0)
    network = Network(checkpoint)
    for index, (name, block, reached) in enumerate(network.sweep(batches)):
        if index not in BLOCKS:
            continue
        found = layers(block, f"{name}.")
        for stage in layer_stages(network, block, f"{name}.", reached[0]):
            moments, _ = second_moments(network, block, found, stage.names, stage.calls, reached, {})
            for member in stage.names:
                yield found[member].weight.data.float().clone(), moments[member]
        if index == BLOCKS[-1]:
            return


def measure() -> dict[str, Any]:
    """Row -> the mean error, and the CPU-seconds of all matrices."""
    logs, seconds, nbytes = dict.fromkeys(ROWS, 0.0), dict.fromkeys(ROWS, 0.0), dict.fromkeys(ROWS, 0)
    for method, _ in ROWS.values():  # what is made or compiled once is not anyone's cost
        method.encode(torch.randn(8, 64), Statistics(), torch.Generator())
    n = n_weights = 0
    for weight, hessian in matrices():
        size = float((weight @ hessian * weight).sum())
        for name, (method, then) in ROWS.items():
            began = time.process_time()
            encoding = method.encode(weight, Statistics(hessian), torch.Generator().manual_seed(0))
            assert isinstance(encoding, Codebook)
            encoding = then(weight, hessian, encoding) if then else encoding
            seconds[name] += time.process_time() - began
            nbytes[name] += encoding.nbytes
            error = encoding.decode() - weight
            logs[name] += math.log(float((error @ hessian * error).sum()) / size)
        n, n_weights = n + 1, n_weights + weight.numel()
    return {
        name: {
            "error": math.exp(logs[name] / n), "bits": round(8 * nbytes[name] / n_weights, 3),
            "cpu_seconds": round(seconds[name], 1),
        }
        for name in ROWS
    }  # fmt: skip


def layers_table(results: dict[str, Any]) -> str:
    """A row per step."""
    rows = [
        [name, f"{100 * entry['error']:.2f} %", f"{entry['bits']:.2f}", number(entry["cpu_seconds"], 1)]
        for name, entry in results.items()
    ]
    return markdown(["step", "share of the output", "bits per weight, all parts", "CPU-seconds, 21 matrices"], rows)


def main() -> None:
    torch.set_num_threads(1)
    results = measure()
    write_results("layers", results)
    print(layers_table(results))
    import make_tables

    make_tables.main()


if __name__ == "__main__":
    main()
