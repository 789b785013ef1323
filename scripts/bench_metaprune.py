#!/usr/bin/env python
"""metaprune against its pruner alone and against sparse training, at 2.3 times fewer multiplications; paired seeds.

    scripts/fetch_material fashion
    scripts/bench_metaprune.py [--images 10000] [--seeds 3] [--only ROW …]

He et al.'s ResNet-20 of width 8 on Fashion-MNIST, each 2 × 2 pixels one. Eight networks are trained, pruned a little,
and a metanetwork learns from six of them (scripts/metatrain.py); then networks of other seeds are pruned: with the
metanetwork; by norms alone, with as many epochs; by HESSO in one training of as many epochs; and by HESSO in a training
that takes the CPU time of metaprune and of all that its metanetwork cost. A seed is the weights' and the order of the
batches. Accuracy is of the artifacts in onnxruntime on the whole test set; test images choose nothing. What is finished
stays in the cache. Results go to docs/measured/metaprune.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_once import accuracy, pooled
from bench_traffic import accuracy as module_accuracy
from measured import cached, markdown, number, read_results, write_results
from metatrain import TRAINING, trained
from networks import resnet20_8

from compressor.core.batch import Examples
from compressor.core.options import RunOptions
from compressor.core.progress import make_progress
from compressor.learning.trainer import Fitting
from compressor.passes.parts.metanetwork import Shape, save_metanetwork
from compressor.passes.settings.hesso import HessoSettings
from compressor.passes.settings.metaprune import MetapruneSettings
from compressor.run.pipeline import run
from compressor.structure.metatraining import MetaTraining

ARCH = "networks:resnet20_8"
FRACTION = round(1 - 1 / 2.3, 4)
"""Of the multiplications, that goes."""
POPULATION, JUDGES = 8, 2
EPOCHS, PRUNED_EPOCHS, BEFORE, AFTER = 6, 2, 3, 6
"""Of a network's own training; of one of the population after its little pruning; of the rows before and after."""
OPTIONS: dict[str, Any] = {"optimizer": "SGD"} | {name: TRAINING[name] for name in ("batch", "loss", "options")}
PRUNING: dict[str, Any] = OPTIONS | {
    "pass": "metaprune", "fraction": FRACTION, "step": 0.01, "epochs_before": BEFORE, "rate_before": 0.01,
    "epochs": AFTER, "rate": 0.05,
}  # fmt: skip
SPARSE: dict[str, Any] = OPTIONS | {"pass": "hesso", "fraction": FRACTION, "of": "flops", "rate": 0.05}
ROWS = ("metaprune", "norms alone", "sparse, as many epochs", "sparse, as much CPU time")


def network(folder: Path, name: str, seed: int, data: Examples) -> tuple[Path, float]:
    """Weights of a network trained from scratch, once, and its CPU-seconds."""
    target, cost = folder / f"{name}-{seed}.pt", folder / f"{name}-{seed}.json"
    if not cost.is_file():
        torch.manual_seed(seed)
        module, began = resnet20_8(), time.process_time()
        settings = HessoSettings.model_validate(OPTIONS | {"epochs": EPOCHS, "rate": 0.1})
        with make_progress().task(target.name, 1) as task:
            Fitting(module, data, settings, seed, None, lambda share, note: task.advance(share, note=note)).train()
        torch.save(module.state_dict(), target)
        cost.write_text(json.dumps(time.process_time() - began))
    return target, json.loads(cost.read_text())


def metanetwork(folder: Path, data: Examples) -> dict[str, Any]:
    """The metanetwork, trained once; what it cost and its log."""
    target, record = folder / "metanetwork.safetensors", folder / "metanetwork.json"
    if not record.is_file():
        networks = [network(folder, "population", 100 + i, data) for i in range(POPULATION)]
        began = time.process_time()
        before, pruning = (
            MetapruneSettings.model_validate(
                TRAINING | {"fraction": fraction, "epochs_before": first, "epochs": epochs}
            )
            for fraction, first, epochs in ((0.23, 0, PRUNED_EPOCHS), (FRACTION, 1, 1))
        )
        found, log = trained(
            [str(path) for path, _ in networks], ARCH, str(folder / "train.npz"), JUDGES, before, pruning,
            MetaTraining(), Shape(), 0,
        )  # fmt: skip
        save_metanetwork(target, found)
        said = {"population": round(sum(cost for _, cost in networks), 1),
                "meta-training": round(time.process_time() - began, 1), "log": log}  # fmt: skip
        record.write_text(json.dumps(said))
    return json.loads(record.read_text())


def row(folder: Path, name: str, seed: int, start: Path, step: dict[str, Any]) -> dict[str, Any]:
    """One whole run of `compress`, resumed where it was interrupted; what came of it."""
    output, recipe = folder / f"{name}-{seed}".replace(" ", "-").replace(",", ""), folder / f"{name}.yaml"
    if not output.is_dir():
        recipe.write_text(json.dumps({"passes": [step], "evaluation": {"tokens": 0}}))
        partial = output.with_name(f"{output.name}.partial")
        run(RunOptions(model=str(start), recipe=str(recipe), data=str(folder / "train.npz"), arch=ARCH,
                       eval=str(folder / "one.npz"), output=output, seed=seed, resume=partial.is_dir(),
                       progress=make_progress()))  # fmt: skip
    report = json.loads((output / "compression.json").read_text())
    (structure,) = report["structure"]
    return {
        "accuracy": accuracy(output, *pooled("t10k", None, 2)), "parameters": structure["parameters"],
        "cpu_seconds": round(report["cost"]["structure"]["cpu_seconds"], 1), "epochs": len(structure["training"]),
    } | ({"changed": structure["changed"]} if "changed" in structure else {})  # fmt: skip


def start_accuracy(start: Path) -> float:
    """On all test images, in torch."""
    module = resnet20_8().eval()
    module.load_state_dict(torch.load(start, weights_only=True))
    return module_accuracy(module, *(torch.from_numpy(each) for each in pooled("t10k", None, 2)))


def metaprune_table(results: dict[str, Any]) -> str:
    """A row per way, with each seed's accuracy."""
    rows: list[list[object]] = [
        ["before pruning", *[f"{100 * each['start']:.2f}" for each in results["seeds"].values()],
         number(100 * statistics.mean(each["start"] for each in results["seeds"].values()), 2), "–", "–", "–"]
    ]  # fmt: skip
    shared = results["metanetwork"]["population"] + results["metanetwork"]["meta-training"]
    for name in ROWS:
        found = [each["rows"][name] for each in results["seeds"].values() if name in each["rows"]]
        if not found:
            continue
        accuracies = [100 * each["accuracy"] for each in found]
        seconds = statistics.mean(each["cpu_seconds"] for each in found)
        missing = ["–"] * (len(results["seeds"]) - len(found))
        epochs = statistics.mean(each["epochs"] for each in found) + (BEFORE if name in ROWS[:2] else 0)
        rows.append([
            name, *[f"{each:.2f}" for each in accuracies], *missing, number(statistics.mean(accuracies), 2),
            number(epochs, 0), number(seconds, 0), number(seconds + (shared if name == "metaprune" else 0), 0),
        ])  # fmt: skip
    seeds = [f"seed {seed}" for seed in results["seeds"]]
    titles = ["ResNet-20 of width 8", *seeds, "mean %", "epochs", "CPU-seconds", "with the metanetwork's"]
    log = results["metanetwork"]["log"]
    best = min((entry for entry in log[1:] if "pruned_loss" in entry), key=lambda entry: entry["pruned_loss"])
    head = (
        f"{FRACTION:.1%} of the multiplications removed, {results['images']:,} training images of 14 × 14, accuracy on "
        "10,000 test images.\n\n"
    )
    ending = (
        f"\n\nThe metanetwork took {results['metanetwork']['population']:,.0f} CPU-seconds for its population and "
        f"{results['metanetwork']['meta-training']:,.0f} to learn. Its judges, pruned and shortly trained: loss "
        f"{log[0]['pruned_loss']:.3f} without it, {best['pruned_loss']:.3f} with that of round {best['round']}; not "
        f"pruned {log[0]['whole_loss']:.3f} and {best['whole_loss']:.3f}."
    )
    return head + markdown(titles, rows) + ending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS)
    asked = parser.parse_args()
    folder = cached(f"metaprune/{asked.images}")
    images, labels = pooled("train", asked.images, 2)
    if not (folder / "train.npz").is_file():
        np.savez(folder / "one.npz", input=images[:1], labels=labels[:1])
        np.savez(folder / "train.npz", input=images, labels=labels)
    data = Examples({"": torch.from_numpy(images)}, torch.from_numpy(labels))
    learned = metanetwork(folder, data)
    results = read_results("metaprune") | {"images": asked.images, "metanetwork": learned}
    file = str(folder / "metanetwork.safetensors")
    for seed in range(asked.seeds):
        start, _ = network(folder, "start", seed, data)
        entry = results.setdefault("seeds", {}).setdefault(str(seed), {"rows": {}})
        entry["start"] = start_accuracy(start)
        for name in asked.only:
            step = PRUNING | {"network": file if name == "metaprune" else None}
            if name.startswith("sparse"):
                step = SPARSE | {"epochs": BEFORE + AFTER}
            if name == "sparse, as much CPU time":
                one = entry["rows"]["sparse, as many epochs"]
                due = entry["rows"]["metaprune"]["cpu_seconds"] + learned["population"] + learned["meta-training"]
                step = SPARSE | {"epochs": round((BEFORE + AFTER) * due / one["cpu_seconds"])}
            entry["rows"][name] = row(folder, name, seed, start, step)
            print(seed, name, entry["rows"][name], flush=True)
            write_results("metaprune", results)
    print(metaprune_table(results))


if __name__ == "__main__":
    main()
