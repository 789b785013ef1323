#!/usr/bin/env python
"""ReSTE against plain STE and EDE on ResNet-20 and Fashion-MNIST: binary weights, and binary weights and inputs.

    scripts/fetch_material fashion
    scripts/bench_binary.py [--network he] [--images 3000] [--pool 2] [--epochs 4] [--dense-epochs 10] [--seeds 3]
                            [--only NAME …]

The network is He et al.'s, whose convolutions read what a Relu gave, or with `--network signed` ReSTE's authors' own,
where each Relu comes before its batch norm, so that signs of inputs tell something. Every training starts at the same
dense network, trained here first, with the same settings; a seed is an order of the
batches. Images are averaged over squares of `--pool` pixels first: 2 makes 14×14 and takes a quarter of the time, 1
leaves them. Each run is a whole one, to an artifact: accuracy is of onnxruntime on the whole test set, beside that of
torch on the decoded weights. At the end the recipe cnn-binary once, on int8. What is finished stays in the cache and is
not done again, an interrupted training is resumed. Results go to docs/measured/binary.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bench_once import accuracy, pooled
from measured import cached, interleaved, markdown, number, read_results, write_results
from networks import resnet20, resnet20_signed

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.core.batch import Examples
from compressor.core.options import RunOptions
from compressor.core.progress import make_progress
from compressor.evaluate.bench import size
from compressor.evaluate.original import export_original
from compressor.learning.trainer import Fitting
from compressor.passes.reste import FLAT
from compressor.passes.settings.hesso import HessoSettings
from compressor.run.pipeline import run

TRAINING: dict[str, Any] = {
    "batch": 32, "loss": "labels", "optimizer": "SGD", "rate": 0.1, "options": {"momentum": 0.9},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "reste": {"estimator": "reste"},
    "ste": {"estimator": "ste"},
    "ede": {"estimator": "ede"},
    "reste unit-mean": {"estimator": "reste", "unit": "mean"},
}
"""Rows of the table, for both kinds of activations."""
SEED = 0
"""Of the network that all start from."""
NETWORKS = {"he": resnet20, "signed": resnet20_signed}
TITLES = {"he": "He et al.'s ResNet-20", "signed": "ResNet-20 of ReSTE's authors"}


def dense_network(network: str, folder: Path, epochs: int, images: np.ndarray, labels: np.ndarray) -> Path:
    """The network that all start from, trained once."""
    weights = folder / "dense.pt"
    if weights.is_file():
        return weights
    torch.manual_seed(SEED)
    module = NETWORKS[network]()
    settings = HessoSettings(
        epochs=epochs, batch=64, optimizer="SGD", rate=0.1,
        options={"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    )  # fmt: skip
    examples = Examples({"": torch.from_numpy(images)}, torch.from_numpy(labels))
    with make_progress().task("dense training", 1) as task:
        Fitting(module, examples, settings, SEED, folder / "dense-training",
                lambda share, note: task.advance(share, note=note)).train()  # fmt: skip
    torch.save(module.state_dict(), weights)
    return weights


def dense_artifact(arch: str, folder: Path, weights: Path, example: np.ndarray) -> Path:
    """The same network, uncompressed."""
    target = folder / "dense"
    if not target.is_dir():
        partial = folder / "dense.partial"
        partial.mkdir(exist_ok=True)
        export_original(open_checkpoint(weights, arch=arch), partial, [{"": torch.from_numpy(example)}])
        (partial / "compression.json").write_text(json.dumps({"source": {"arch": arch}}))
        partial.rename(target)
    return target


def artifact(
    arch: str, target: Path, weights: Path, data: Path, recipe: str, seed: int, sets: tuple[str, ...] = ()
) -> Path:
    """The artifact of a recipe, made once."""
    if not target.is_dir():
        partial = target.with_name(f"{target.name}.partial")
        options = RunOptions(
            model=str(weights), recipe=recipe, sets=sets, data=str(data), eval=str(data.with_name("one.npz")),
            arch=arch, output=target, seed=seed, resume=partial.is_dir(), progress=make_progress(),
        )  # fmt: skip
        run(options)
    return target


def flat_share(weights: Path) -> float:
    """The share of the dense network's weights, of layers that become binary, where ReSTE's slope is the chord's."""
    stored = torch.load(weights, weights_only=True)
    values = torch.cat([tensor.abs().flatten() for name, tensor in stored.items() if ".conv" in name])
    return round(float((values <= FLAT).float().mean()), 4)


def torch_accuracy(directory: Path, arch: str, images: np.ndarray, labels: np.ndarray) -> float:
    """Of the decoded weights."""
    module = compressor.load(directory, arch=arch)
    with torch.no_grad():
        found = torch.cat([module(part).argmax(1) for part in torch.from_numpy(images).split(100)])
    return round(float((found.numpy() == labels).mean()), 4)


def measured(directory: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What one artifact came to."""
    file = directory.with_name(f"{directory.name}.json")
    if file.is_file():
        return json.loads(file.read_text())
    report = json.loads((directory / "compression.json").read_text())
    binary = report["binary"]
    found = {
        "accuracy": accuracy(directory, images, labels),
        "torch_accuracy": torch_accuracy(directory, report["source"]["arch"], images, labels),
        "bytes": size(directory)["bytes"], "weights_file": (directory / "model.safetensors").stat().st_size,
        "binary_bytes": binary["bytes"], "float_bytes": binary["float_bytes"], "runs_as": binary["runs_as"],
        "losses": [entry["loss"] for entry in report["structure"][0]["training"]],
        "cpu_seconds": round(report["cost"]["structure"]["cpu_seconds"], 1),
    }  # fmt: skip
    file.write_text(json.dumps(found))
    return found


def binary_table(results: dict[str, Any]) -> str:
    """For each network a row per estimator and kind of activations, then what one artifact takes."""
    return "\n\n".join(_network_table(network, found) for network, found in results.items())


def _network_table(network: str, results: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for name, entries in results["trainings"].items():
        if not entries:
            continue
        accuracies = [100 * entry["accuracy"] for entry in entries]
        apart = max(abs(100 * (entry["accuracy"] - entry["torch_accuracy"])) for entry in entries)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        rows.append([
            name, number(statistics.mean(accuracies), 2), number(spread, 2), " ".join(f"{a:.2f}" for a in accuracies),
            f"{apart:.2f}", number(statistics.mean(entry["losses"][-1] for entry in entries), 3),
            number(statistics.mean(entry["cpu_seconds"] for entry in entries), 0),
        ])  # fmt: skip
    titles = ["activations, estimator", "accuracy, mean %", "standard deviation", "seeds", "largest distance to torch",
              "training loss, last epoch", "CPU-seconds"]  # fmt: skip
    dense, int8 = results["dense"], results["int8"]
    head = (
        f"**{TITLES[network]}**: {results['images']:,} training images of {results['side']}×{results['side']}, "
        f"{results['epochs']} epochs ({results['steps']:,} steps of "
        f"{results['batch']}) from one dense network of {100 * dense['accuracy']:.2f} %; labels; no augmentation; "
        f"accuracy in onnxruntime on {results['test_images']:,} test images.\n\n"
    )
    first = results["trainings"]["float, reste"][0]
    sizes = [
        ["dense, float32", f"{dense['bytes']:,}", None, None, f"{100 * dense['accuracy']:.2f} %"],
        ["reste, the rest in float32", f"{first['bytes']:,}", *_layers(first), f"{100 * first['accuracy']:.2f} %"],
        ["`cnn-binary`: int8, the rest in 8 bits", f"{int8['bytes']:,}", *_layers(int8),
         f"{100 * int8['accuracy']:.2f} %"],
    ]  # fmt: skip
    speed = results["speed"]
    times = "; ".join(f"{name} {number(ms, 2)} ms" for name, ms in speed.items())
    return (
        head + markdown(titles, rows) + "\n\n"
        + markdown(["one artifact, seed 0", "bytes, all files", "binary layers", "times smaller", "accuracy"], sizes)
        + f"\n\nOf the dense network's weights in these layers {results['flat_share']:.0%} are within ±0.1."
        + f"\n\nOne image on one thread, all in turn: {times}."
    )  # fmt: skip


def _layers(entry: dict[str, Any]) -> list[object]:
    return [f"{entry['binary_bytes']:,} of {entry['float_bytes']:,}",
            f"{entry['float_bytes'] / entry['binary_bytes']:.1f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="he", choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--pool", type=int, default=2, choices=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="rows, as 'float, reste'; the others as far as they are there")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no further training is begun")
    arguments = parser.parse_args()
    began = time.monotonic()
    images, labels = pooled("train", arguments.images, arguments.pool)
    test_images, test_labels = pooled("t10k", None, arguments.pool)
    network, results = arguments.network, read_results("binary")
    arch = f"networks:{NETWORKS[network].__name__}"
    folder = cached(f"binary/{network}-{len(images)}-{arguments.pool}-{arguments.dense_epochs}-{arguments.epochs}")
    data = folder / "train.npz"
    if not data.is_file():
        np.savez(folder / "one.npz", input=test_images[:1], labels=test_labels[:1])
        np.savez(data, input=images, labels=labels)
    weights = dense_network(network, folder, arguments.dense_epochs, images, labels)
    dense = dense_artifact(arch, folder, weights, test_images[:1])
    trainings: dict[str, list[dict[str, Any]]] = {
        f"{activations}, {name}": [] for activations in ("float", "binary") for name in VARIANTS
    }
    head = {
        "images": len(images), "side": images.shape[-1], "epochs": arguments.epochs,
        "dense_epochs": arguments.dense_epochs, "steps": len(images) // TRAINING["batch"] * arguments.epochs,
        "test_images": len(test_labels), **TRAINING, "onnxruntime": onnxruntime.__version__,
        "flat_share": flat_share(weights),
        "dense": {"accuracy": accuracy(dense, test_images, test_labels), "bytes": size(dense)["bytes"]},
    }  # fmt: skip
    for seed in range(arguments.seeds):
        for row, entries in trainings.items():
            activations, name = row.split(", ")
            target = folder / f"{activations}-{name}-{seed}".replace(" ", "-")
            wanted = arguments.only is None or row in arguments.only
            if not target.is_dir() and (not wanted or time.monotonic() - began > 60 * arguments.minutes):
                continue
            settings = {"activations": activations, "epochs": arguments.epochs, **TRAINING, **VARIANTS[name]}
            recipe = folder / f"{target.name}.yaml"
            recipe.write_text(json.dumps({"passes": [{"pass": "reste"} | settings], "evaluation": {"tokens": 0}}))
            entries.append(measured(artifact(arch, target, weights, data, str(recipe), seed), test_images, test_labels))
            print(row, seed, entries[-1]["accuracy"], entries[-1]["torch_accuracy"], flush=True)
        if seed == 0:
            sets = (f"reste.epochs={arguments.epochs}", f"reste.batch={TRAINING['batch']}", "evaluation.tokens=0")
            int8 = artifact(arch, folder / "int8", weights, data, "cnn-binary", 0, sets)
            together = {"dense": dense, "reste": folder / "float-reste-0", "`cnn-binary`": int8}
            seconds = interleaved(together, {"input": test_images[:1]}, 1, 200)
            speed = {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()}
            head |= {"int8": measured(int8, test_images, test_labels), "speed": speed}
        results[network] = head | {"trainings": {row: entries for row, entries in trainings.items() if entries}}
        write_results("binary", results)
    print(_network_table(network, results[network]))


if __name__ == "__main__":
    main()
