#!/usr/bin/env python
"""Perplexity of SmolLM2-135M with weights dropped by gblm and its baselines, and what α, p, N and the text change.

    scripts/fetch_material smollm2 moby sotu
    scripts/bench_pruning.py [--only scores alpha sequences allocation text reconstruct] [--again]

The linears of the blocks are pruned block by block, with inputs from the already pruned blocks, through compressor's
own sweep; embeddings and norms stay. Kept weights stay float32: nothing is quantised, so this is what pruning alone
costs. Perplexity is measured in torch, block by block, by the evaluator that measures originals, on the first 8 windows
of 512 tokens of each text. Calibration is the built-in sample, windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from material import model_dir, text
from measured import PROTOCOL, cached, markdown, number, read_results, set_windows, write_results
from torch import Tensor, nn

from compressor import data
from compressor.checkpoints import open_checkpoint
from compressor.core.batch import Batch
from compressor.core.contract import Statistics
from compressor.core.tensors import EncodedTensor, EncodedTensors, write_tensors
from compressor.data.text import Text
from compressor.data.tokens import tokenize, windows
from compressor.evaluate.language import evaluate_language
from compressor.evaluate.reference import original_logits
from compressor.export.loading import decoded_checkpoint
from compressor.graph.blocks import layers
from compressor.passes.gblm import Gblm, outlier_fraction
from compressor.sweeps.gradients import GradientFiles, gather_gradients, load_gradients
from compressor.sweeps.moments import layer_stages, second_moments
from compressor.sweeps.network import Network

MODEL, WINDOW, SEQUENCES, BATCH = "smollm2", 512, 16, 4
AMOUNTS: dict[str, dict[str, Any]] = {
    "30 %": {"sparsity": 0.3}, "50 %": {"sparsity": 0.5}, "60 %": {"sparsity": 0.6}, "2:4": {"pattern": "2:4"},
}  # fmt: skip
SCORES = ("gblm", "wanda", "magnitude", "sparsegpt")
HALF = AMOUNTS["50 %"]


@dataclass(frozen=True)
class Run:
    """One pruned network: the pass's settings, how many calibration sequences of which text, how shares are given."""

    group: str
    name: str
    settings: dict[str, Any]
    n: int = SEQUENCES
    source: str = "sample"
    shares: Literal["", "gradients", "activations"] = field(default="")


def runs() -> list[Run]:
    """What matters most first."""
    found = [
        Run("scores", f"{score}, {amount}", {"score": score, **settings})
        for amount, settings in sorted(AMOUNTS.items(), key=lambda item: item[0] != "50 %")
        for score in SCORES
    ]
    found += [
        Run("alpha", f"p = {p}, α = {alpha}", {"p": p, "alpha": float(alpha), **HALF})
        for p, alphas in ((1, (10, 1000)), (2, (100, 1000))) for alpha in alphas
    ]  # fmt: skip
    found.append(Run("alpha", "p = 1, α = 100, paper", {"variant": "paper", **HALF}))
    found += [
        Run("sequences", f"{score}, {n} sequences", {"score": score, **HALF}, n)
        for n in (128,) for score in ("gblm", "wanda")
    ]  # fmt: skip
    found += [
        Run("text", f"{score}, addresses of 1850–1856 and 2010–2014", {"score": score, **HALF}, source="tuning")
        for score in ("gblm", "wanda")
    ]
    found += [
        Run("allocation", f"{score}, {amount}, by outliers of {shares}", {"score": score, **AMOUNTS[amount]},
            shares=shares)
        for amount in ("60 %",) for score in ("gblm", "wanda") for shares in ("gradients", "activations")
    ]  # fmt: skip
    found += [
        Run("reconstruct", f"{score}, {amount}", {"score": score, "reconstruct": "layer", **AMOUNTS[amount]})
        for score in ("wanda", "sparsegpt") for amount in ("50 %", "2:4")
    ]  # fmt: skip
    return found


class Bench:
    """The checkpoint and what runs share: batches, gradients, the dense network's input moments."""

    def __init__(self) -> None:
        self.checkpoint = open_checkpoint(model_dir(MODEL))
        self.folder = cached(f"pruning-{self.checkpoint.digest()[:12]}")
        found = [set_windows(name) for name in PROTOCOL]
        self.windows, self.sizes = np.concatenate(found), [len(part) for part in found]

    def batches(self, run: Run) -> list[Batch]:
        source = data.load(None, "calibration") if run.source == "sample" else Text("tuning", (text("tuning"),))
        chosen = torch.from_numpy(windows(tokenize(source, self.checkpoint.path), WINDOW, run.n, 0))
        return [{"input_ids": part} for part in chosen.split(BATCH)]

    def gradients(self, run: Run, p: Literal[1, 2]) -> Path:
        """The folder with every block's gradients; gathered at the first call."""
        folder = self.folder / f"gradients-{run.source}-{run.n}-{p}"
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            gather_gradients(
                Network(self.checkpoint), self.batches(run), GradientFiles(partial, p), torch.Generator().manual_seed(0)
            )
            partial.rename(folder)
        return folder

    def shares(self, run: Run, method: Gblm) -> dict[str, float]:
        """The share to drop per matrix, by OWL's rule on |W|⊙G or on |W|⊙‖X‖ of the dense network."""
        if not run.shares:
            return {}
        folder = self.gradients(run, 1)
        outliers, shapes = {}, {}
        network = Network(self.checkpoint)
        needed = self.batches(run) if run.shares == "activations" else self.batches(run)[:1]
        wanda = Gblm(score="wanda")
        for name, block, reached in network.sweep(needed):
            gradients = load_gradients(folder, name)
            found = layers(block, f"{name}.")
            moments = _moments(network, block, f"{name}.", reached) if run.shares == "activations" else iter(())
            dense = dict(moments)
            for key, module in found.items():
                weight = module.weight.data
                known = Statistics(dense.get(key), window=WINDOW)
                scores = wanda.scores(weight, known) if dense else weight.abs() * gradients[key]
                outliers[key], shapes[key] = outlier_fraction(scores), tuple(weight.shape)
        return method.model_copy(update={"allocation": "importance"}).allocate(outliers, shapes)

    @torch.no_grad()
    def prune(self, run: Run) -> EncodedTensors:
        """The network with what the pass leaves of the blocks' linears."""
        method = Gblm(**run.settings)
        folder = self.gradients(run, method.gradient_norm) if method.gradient_norm else None
        shares = self.shares(run, method)
        network = Network(self.checkpoint)
        files = [self._outside(network)]
        for name, block, reached in network.sweep(self.batches(run)):
            gradients = load_gradients(folder, name) if folder else {}
            found = layers(block, f"{name}.")
            for key, moment in _moments(network, block, f"{name}.", reached, "data" in method.needs):
                known = Statistics(moment, gradients.get(key), run.n, WINDOW, shares.get(key))
                weight, kept = method.prune(found[key].weight.data, known)
                assert bool((weight[~kept] == 0).all())
                found[key].weight.data = weight
            files.append(self.folder / f"{name}.safetensors")
            tensors = block.state_dict(prefix=f"{name}.", keep_vars=True)
            write_tensors(files[-1], {key: EncodedTensor.dense(tensor) for key, tensor in tensors.items()})
        return EncodedTensors(files, self.checkpoint.tied)

    def _outside(self, network: Network) -> Path:
        file = self.folder / "outside.safetensors"
        names = [name for name in network.outside if name in self.checkpoint.tensors]
        if not file.exists():
            write_tensors(file, {name: EncodedTensor.dense(self.checkpoint.read(name).float()) for name in names})
        return file

    def losses(self, tensors: EncodedTensors | None) -> dict[str, list[float]]:
        """The mean loss of every window of each set; of the original without tensors."""
        checkpoint = self.checkpoint if tensors is None else decoded_checkpoint(self.checkpoint, tensors)
        logits = original_logits(checkpoint, self.windows)

        class Session:
            def logits(self, _: np.ndarray) -> np.ndarray:
                return next(logits)

        found = [math.log(evaluate_language(Session(), None, window[None]).perplexity) for window in self.windows]
        parts = np.split(np.array(found), np.cumsum(self.sizes)[:-1])
        return {name: part.tolist() for name, part in zip(PROTOCOL, parts, strict=True)}


def perplexity(losses: list[float]) -> float:
    """Of windows of one length."""
    return math.exp(sum(losses) / len(losses))


def difference(entry: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """How much higher the mean loss over all windows is than another run's, and the standard error of that."""
    mine, theirs = (np.concatenate(list(run["losses"].values())) for run in (entry, other))
    apart = mine - theirs
    return float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))


def _moments(
    network: Network, block: nn.Module, prefix: str, reached: list, needed: bool = True
) -> Iterator[tuple[str, Tensor | None]]:
    """Every layer of a block, in stages, with its inputs' second moment as the block computes when it is due."""
    found = layers(block, prefix)
    for stage in layer_stages(network, block, prefix, reached[0]):
        moments = {}
        if needed:
            moments, _ = second_moments(network, block, found, stage.names, stage.calls, reached, {})
        for name in stage.names:
            yield name, moments.get(name)


def pruning_table(results: dict[str, Any]) -> str:
    """Both texts by score and share, each beside Wanda of the same share; then what else was varied."""
    dense, runs_ = results["dense"], results["runs"]
    rows: list[list[object]] = [["dense", *(number(perplexity(dense[name])) for name in PROTOCOL), None]]
    keys = [f"scores: {score}, {amount}" for amount in AMOUNTS for score in SCORES]
    keys += [key for key in runs_ if not key.startswith("scores: ")]
    for key in (key for key in keys if key in runs_):
        amount = key.split(", ")[1] if ", " in key and key.split(", ")[1] in AMOUNTS else "50 %"
        base = runs_.get(f"scores: wanda, {amount}")
        beside = None
        if base is not None and base is not runs_[key]:
            mean, error = difference(runs_[key], base)
            beside = f"{mean:+.3f} ± {error:.3f}"
        figures = (number(perplexity(runs_[key]["losses"][name])) for name in PROTOCOL)
        rows.append([key.removeprefix("scores: "), *figures, beside])
    return markdown(["", "Moby Dick, 8", "State of the Union, 8", "log, beside wanda of that share"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(run.group for run in runs()))
    parser.add_argument("--only", nargs="+", default=groups, choices=groups)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    import make_tables

    bench = Bench()
    results = read_results("pruning") or {"dense": bench.losses(None), "runs": {}}
    for run in runs():
        key = f"{run.group}: {run.name}"
        if run.group not in arguments.only or (key in results["runs"] and not arguments.again):
            continue
        gc.collect()  # the last run's files are still mapped
        began = time.process_time()
        tensors = bench.prune(run)
        spent = round(time.process_time() - began, 1)
        results["runs"][key] = {
            "settings": run.settings, "sequences": run.n, "calibration": run.source, "shares": run.shares,
            "cpu_seconds": spent, "losses": bench.losses(tensors),
        }  # fmt: skip
        write_results("pruning", results)
        make_tables.main()
        figures = ", ".join(f"{perplexity(losses):.2f}" for losses in results["runs"][key]["losses"].values())
        print(f"{key}: {figures}; {spent} CPU-seconds", flush=True)
    print(pruning_table(results))


if __name__ == "__main__":
    main()
