#!/usr/bin/env python
"""HESSO, OTO and OTO's erasing at a fifth of ResNet-20's parameters, against dense training of as many steps.

    scripts/fetch_material fashion
    scripts/bench_once.py [--images 60000] [--epochs 20] [--fraction 0.8] [--penalty 1.0] [--passes …]
                          [--seeds 0 1 2] [--pool 2]

On Fashion-MNIST, averaged over squares of `--pool` pixels. All of a seed start from the same random weights and see the
same batches with the same rates. Accuracy is of the artifacts in onnxruntime on the whole test set; speed of one image,
of the first seed, all in turn in the same run. What is finished stays in the cache and is not done again, and an
interrupted training is resumed: with 60,000 images an epoch takes minutes. Results go to docs/measured/once.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from material import model_dir
from measured import cached, interleaved, markdown, number, read_results, write_results
from networks import resnet20

from compressor.checkpoints import open_checkpoint
from compressor.core.batch import Examples
from compressor.core.options import RunOptions
from compressor.core.progress import make_progress
from compressor.evaluate.bench import size
from compressor.evaluate.original import export_original
from compressor.evaluate.session import open_session
from compressor.learning.trainer import Fitting
from compressor.passes.settings.hesso import HessoSettings
from compressor.passes.settings.training import TrainingSettings
from compressor.run.pipeline import run

MEAN, STD = 0.2860, 0.3530
ARCH = "networks:resnet20"
TRAINING: dict[str, Any] = {
    "batch": 64, "optimizer": "SGD", "rate": 0.1, "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
}  # fmt: skip

PASSES: dict[str, dict[str, Any]] = {
    "hesso": {"pass": "hesso"}, "oto": {"pass": "oto", "penalty": 1},
    "oto-erase": {"pass": "oto", "penalty": 10, "erase": True},
}  # fmt: skip
"""Rows of the table; `penalty` in those of the command line."""


def fashion(part: str, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images, float32 (n, 1, 28, 28), and labels of "train" or "t10k"."""
    found = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(model_dir("fashion") / f"{part}-{kind}-ubyte.gz") as file:
            found.append(np.frombuffer(file.read(), dtype=np.uint8, offset=header))
    images = (found[0].reshape(-1, 1, 28, 28)[:n].astype(np.float32) / 255 - MEAN) / STD
    return images, found[1][:n].astype(np.int64)


def pooled(part: str, n: int | None, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, each `pool` × `pool` pixels one, and labels."""
    images, labels = fashion(part, n)
    side = images.shape[-1] // pool
    return images.reshape(-1, 1, side, pool, side, pool).mean((3, 5)), labels


def train_dense(
    folder: Path, start: Path, settings: TrainingSettings, images: np.ndarray, labels: np.ndarray, seed: int
) -> Path:  # fmt: skip
    """The artifact of the dense network; it and what it took, once."""
    target = folder / "dense"
    if target.is_dir():
        return target
    module = resnet20()
    module.load_state_dict(torch.load(start, weights_only=True))
    examples = Examples({"": torch.from_numpy(images)}, torch.from_numpy(labels))
    began = time.process_time()
    with make_progress().task("dense training", 1) as task:
        loop = Fitting(module, examples, settings, seed, folder / "dense-training",
                       lambda share, note: task.advance(share, note=note))  # fmt: skip
        log = loop.train()
    weights, partial = folder / "dense.pt", folder / "dense.partial"
    torch.save(module.state_dict(), weights)
    partial.mkdir(exist_ok=True)
    export_original(open_checkpoint(weights, arch=ARCH), partial, [{"": torch.from_numpy(images[:1])}])
    cost = {"structure": {"cpu_seconds": time.process_time() - began}}
    (partial / "compression.json").write_text(json.dumps({"structure": [{"training": log}], "cost": cost}))
    partial.rename(target)
    return target


def compressed(folder: Path, name: str, start: Path, data: Path, step: dict[str, Any], seed: int) -> Path:
    """The artifact of one pass by a recipe of its own, once."""
    target, recipe = folder / name, folder / f"{name}.yaml"
    if target.is_dir():
        return target
    recipe.write_text(json.dumps({"passes": [step], "evaluation": {"tokens": 0}}))
    partial = target.with_name(f"{target.name}.partial")
    run(RunOptions(model=str(start), recipe=str(recipe), data=str(data), eval=str(data.with_name("one.npz")), arch=ARCH,
                   output=target, seed=seed, resume=partial.is_dir(), progress=make_progress()))  # fmt: skip
    return target


def accuracy(artifact: Path, images: np.ndarray, labels: np.ndarray) -> float:
    session = open_session(artifact)
    name, fed = session.outputs[0], next(iter(session.inputs))
    found = [session.run({fed: images[i : i + 50]}, [name])[name].argmax(1) for i in range(0, len(images), 50)]
    return round(float((np.concatenate(found) == labels).mean()), 4)


def measured(artifact: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy, size and cost of one artifact."""
    report = json.loads((artifact / "compression.json").read_text())
    structure = report["structure"][0]
    dense = sum(parameter.numel() for parameter in resnet20().parameters())
    entry = {
        "accuracy": accuracy(artifact, images, labels), "parameters": structure.get("parameters", dense),
        "bytes": size(artifact)["bytes"], "cpu_seconds": round(report["cost"]["structure"]["cpu_seconds"], 1),
        "loss": structure["training"][-1]["loss"],
    }  # fmt: skip
    forced = structure.get("set_to_zero_at_the_end")
    units = [size - left for left, size in structure.get("kept_units", {}).values()]
    return entry | ({} if forced is None else {"forced": forced, "units_gone": sum(units)})


def once_table(results: dict[str, Any]) -> str:
    """A table for each share that was removed, of each size of images."""
    return "\n\n".join(_table(results[key]) for key in sorted(results))


def _table(results: dict[str, Any]) -> str:
    """A row per training, of one seed or several."""
    rows: list[list[object]] = []
    for name, entries in results["trainings"].items():
        times, accuracies = results["speed"], [100 * entry["accuracy"] for entry in entries]
        several = [" ".join(f"{each:.2f}" for each in accuracies)] if len(entries) > 1 else []
        rows.append([
            name, f"{entries[0]['parameters']:,}", f"{entries[0]['bytes']:,}", f"{statistics.mean(accuracies):.2f} %",
            *several, *[f"{number(times[f'threads_{n}'][name], 3)} ms" for n in (1, 2)],
            number(statistics.median(entry["cpu_seconds"] for entry in entries), 0),
        ])  # fmt: skip
    n_seeds, side = max(map(len, results["trainings"].values())), results.get("side", 28)
    titles = ["ResNet-20", "parameters", "bytes, all files", "accuracy", *(["seeds"] if n_seeds > 1 else []),
              "one image, 1 thread", "2 threads", "CPU-seconds"]  # fmt: skip
    head = (
        f"{results['fraction']:.0%} of the parameters removed: {results['images']:,} training images of {side}×{side}, "
        f"{results['epochs']} epochs, {results['steps']:,} steps of {results['batch']}, from the same random weights"
        f"{f' in each of {n_seeds} seeds' if n_seeds > 1 else ''}; accuracy on {results['test_images']:,} test images."
        "\n\n"
    )
    forced = {name: entries for name, entries in results["trainings"].items() if "forced" in entries[0]}
    tails = [f"of {name}'s {sum(entry['units_gone'] for entry in entries)} removed "
             f"{'branches' if 'erase' in name else 'units'} {sum(entry['forced'] for entry in entries)}"
             for name, entries in forced.items()]  # fmt: skip
    tail = "Not yet zero at the end of its pruning steps, and set to zero there, were " + ", ".join(tails) + "."
    return f"{head}{markdown(titles, rows)}" + (f"\n\n{tail}" if tails else "")


def trained(arguments: argparse.Namespace, seed: int) -> dict[str, Path]:
    """The artifacts of a seed, by row."""
    images, labels = pooled("train", arguments.images, arguments.pool)
    common = cached(f"once/{len(images)}-{images.shape[-1]}-{arguments.epochs}/{seed}")
    start, data = common / "start.pt", common / "train.npz"
    if not data.is_file():
        torch.manual_seed(seed)
        torch.save(resnet20().state_dict(), start)
        test = pooled("t10k", 1, arguments.pool)
        np.savez(common / "one.npz", input=test[0], labels=test[1])
        np.savez(data, input=images, labels=labels)
    settings = {"fraction": arguments.fraction, "epochs": arguments.epochs, **TRAINING}
    artifacts = {"dense": train_dense(common, start, HessoSettings(**settings), images, labels, seed)}
    folder = cached(f"once/{common.parent.name}/{seed}/{arguments.fraction:g}-{arguments.penalty:g}")
    for name in arguments.passes:
        step = {key: value * arguments.penalty if key == "penalty" else value for key, value in PASSES[name].items()}
        artifacts[name] = compressed(folder, name, start, data, step | settings, seed)
    return artifacts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--fraction", type=float, default=0.8)
    parser.add_argument("--penalty", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pool", type=int, default=1, choices=[1, 2, 4])
    arguments = parser.parse_args()
    found = [trained(arguments, seed) for seed in arguments.seeds]
    test_images, test_labels = pooled("t10k", None, arguments.pool)
    speed = {}
    for threads in (1, 2):
        seconds = interleaved(found[0], {"input": test_images[:1]}, threads, arguments.repeats)
        speed[f"threads_{threads}"] = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    results = {
        "images": arguments.images, "side": test_images.shape[-1], "epochs": arguments.epochs,
        "steps": arguments.images // TRAINING["batch"] * arguments.epochs, "test_images": len(test_labels),
        "fraction": arguments.fraction, "penalty": arguments.penalty, **TRAINING,
        "onnxruntime": onnxruntime.__version__,
        "trainings": {name: [measured(each[name], test_images, test_labels) for each in found] for name in found[0]},
        "speed": {key: {name: round(ms, 3) for name, ms in times.items()} for key, times in speed.items()},
    }  # fmt: skip
    key = f"{arguments.fraction:g}" + (f", {results['side']}" if arguments.pool > 1 else "")
    write_results("once", read_results("once") | {key: results})
    print(_table(results))


if __name__ == "__main__":
    main()
