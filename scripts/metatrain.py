#!/usr/bin/env python
"""Trains a metanetwork for the pass metaprune on networks of one family: convolutions, batch norms, residual sums.

    scripts/metatrain.py NETWORK NETWORK … --data train.npz --output metanetwork.safetensors
        [--arch module:callable] [--judges 2] [--pruned 0.23 --epochs 2] [--rounds 20] [--fraction 0.5]

Networks are trained ones, as `compress` reads them, of one task. Each is pruned a little first and trained on, then a
metanetwork learns from them all; the last of them judge it, pruned by --fraction, and are not learned from. A fifth of
the data is kept back for that. The file is for `network:` of the pass.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.checkpoints import open_checkpoint
from compressor.core.batch import Examples
from compressor.core.progress import make_progress
from compressor.data.arrays import load_arrays
from compressor.passes.parts.metanetwork import Metanetwork, Shape, save_metanetwork
from compressor.passes.settings.metaprune import MetapruneSettings
from compressor.structure.metatraining import MetaTraining, metatrain, pruned_once

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAINING: dict[str, Any] = {
    "step": 0.05, "batch": 64, "loss": "labels", "rate": 0.02, "rate_before": 0.01,
    "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
}  # fmt: skip
"""Of networks that are pruned here."""
KEPT_BACK = 5
"""One of so many examples is for judging."""


def trained(
    networks: Sequence[str], arch: str | None, data: str, judges: int, before: MetapruneSettings,
    pruning: MetapruneSettings, settings: MetaTraining, shape: Shape, seed: int,
) -> tuple[Metanetwork, list[dict[str, Any]]]:  # fmt: skip
    """The metanetwork of these files, and its log; how each is pruned `before`, and how the judges are."""
    modules = [open_checkpoint(path, arch=arch).build("cpu").float().eval() for path in networks]
    arrays = load_arrays(data)
    if len(arrays.inputs) != 1 or arrays.labels is None:
        raise SystemExit(f"{data}: has {len(arrays.inputs)} inputs and {'no ' if arrays.labels is None else ''}labels; "
                         "give one array of images, and labels")  # fmt: skip
    inputs, labels = (torch.from_numpy(each) for each in (next(iter(arrays.inputs.values())), arrays.labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order[len(labels) // KEPT_BACK :], order[: len(labels) // KEPT_BACK]
    learned, judged = (Examples({"": inputs[part]}, labels[part]) for part in parts)
    progress = make_progress()
    for number, module in enumerate(modules) if before.epochs else ():
        with progress.task(f"{networks[number]}: pruned a little", 1) as task:
            modules[number] = pruned_once(module, learned, before, seed + number,
                                          lambda share, note, task=task: task.advance(share, note=note))  # fmt: skip
    with progress.task("metanetwork", 1) as task:
        return metatrain(modules[:-judges], modules[-judges:], learned, judged, settings, pruning, shape, seed,
                         lambda share, note: task.advance(share, note=note))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual, shape = MetaTraining(), Shape()
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--arch", help="of networks that are weights alone")
    parser.add_argument("--data", required=True, help="images and labels")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--judges", type=int, default=2, help="of the networks, which are not learned from")
    parser.add_argument("--pruned", type=float, default=0.23, help="of the multiplications of each network, first")
    parser.add_argument("--epochs", type=int, default=2, help="of training after that; 0: networks stay as they are")
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--examples", type=int, default=usual.examples, help="of a step")
    parser.add_argument("--rate", type=float, default=usual.rate)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the multiplications, when judged")
    parser.add_argument("--layers", type=int, default=shape.layers)
    parser.add_argument("--width", type=int, default=shape.width)
    parser.add_argument("--share", type=float, default=shape.share, help="ρ: of what it says, added to the weights")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if len(asked.networks) <= asked.judges or asked.judges < 1:
        parser.error(f"{len(asked.networks)} networks with {asked.judges} judges leave none to learn from")
    settings = MetaTraining(asked.rounds, asked.examples, asked.rate, round(0.75 * asked.rounds))
    before, pruning = (
        MetapruneSettings.model_validate(TRAINING | {"fraction": fraction, "epochs_before": first, "epochs": epochs})
        for fraction, first, epochs in ((asked.pruned, 0, asked.epochs), (asked.fraction, 1, 1))
    )
    shape = Shape(asked.layers, asked.width, asked.share)
    found, log = trained(asked.networks, asked.arch, asked.data, asked.judges, before, pruning, settings, shape,
                         asked.seed)  # fmt: skip
    save_metanetwork(asked.output, found)
    for entry in log:
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
