#!/usr/bin/env python
"""Mixed precision beside the best uniform setting of the same size, on five networks.

    scripts/fetch_material smollm2 minilm mobilenet digits photos fashion
    pip install pillow
    scripts/bench_mixed.py [--models digits mobilenet minilm smollm2] [--again]
    scripts/bench_once.py --epochs 6          trains the ResNet-20 of
    scripts/bench_mixed.py --models resnet20 --weights …/dense.pt

For each network every uniform setting (bits × group) is run, then mixed precision at the size of several of them, with
--target-size. The quality is that of held-out data in compression.json: the loss of `losses.Kind`. Digits are MNIST
pictures, turned and moved, ten to calibrate on and ten others to evaluate; MobileNetV2 sees crops of thirty pictures,
ten of ImageNet and twenty of CIFAR, and is compared with the original on crops of thirty others, its depthwise
convolutions in 8 bits throughout; the ResNet-20 is calibrated on 512 images of Fashion-MNIST's training set and
evaluated on its 10,000 test images. Results go to docs/measured/mixed.json.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_once import fashion
from bench_vision import crops
from material import model_dir
from measured import cached, markdown, number, read_results, write_results

from compressor.core.options import RunOptions
from compressor.core.progress import make_progress
from compressor.run.gates import came_true
from compressor.run.pipeline import run
from compressor.widths.losses import Kind

RECIPE = """
passes:
- {{pass: affine, method: rtn, bits: 8, group: row}}   # depthwise convolutions
- {{pass: affine, method: gptq, bits: {bits}, group: {group}, zero: learned, scale_bits: 8}}
calibration: {{tokens: 8192, window: {window}, samples: 256}}
embeddings: {{bits: {bits}, group: {group}, zero: learned, scale_bits: 8}}
evaluation: {{tokens: 16384, window: 512, samples: 10000}}
"""


def turned(files: list[Path], n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 1, 28, 28) turned by up to 15°, scaled by up to 15 % and moved by up to 2 pixels, with noise."""
    from PIL import Image

    generator, found, labels = np.random.default_rng(seed), [], []
    for i in range(n):
        file = files[i % len(files)]
        with Image.open(file) as picture:
            angle, scale = np.deg2rad(generator.uniform(-15, 15)), generator.uniform(0.85, 1.15)
            cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
            x, y = 14 + generator.uniform(-2, 2, 2)
            matrix = (cosine, sine, 14 - cosine * x - sine * y, -sine, cosine, 14 + sine * x - cosine * y)
            pixels = np.asarray(picture.convert("L").transform((28, 28), Image.Transform.AFFINE, matrix, 2), np.float32)
        noisy = pixels / 255 + generator.normal(0, 0.1, pixels.shape)
        found.append(noisy.clip(0, 1).astype(np.float32)[None])
        labels.append(int(file.stem.split("_")[2]))
    return np.stack(found), np.array(labels)


def saved(name: str, **arrays: np.ndarray) -> str:
    path = cached("mixed") / f"{name}.npz"
    np.savez(path, **arrays)
    return str(path)


def digits() -> dict[str, str]:
    files, found = sorted(model_dir("photos").glob("mnist_*.png")), {"arch": "scripts.networks:digit_cnn"}
    for name, part, n, seed in (("data", files[::2], 512, 0), ("eval", files[1::2], 1000, 1)):
        x, labels = turned(part, n, seed)
        found[name] = saved(f"digits-{name}", x=x, labels=labels)
    return found


def photos() -> dict[str, str]:
    files = [file for kind in ("imagenet_*.jpg", "cifar10*_*.png") for file in sorted(model_dir("photos").glob(kind))]
    return {
        "data": saved("photos-data", image=crops(files[::2], 240, 0)),
        "eval": saved("photos-eval", image=crops(files[1::2], 600, 3)),
    }  # fmt: skip


def fashion_images() -> dict[str, str]:
    found = {"arch": "networks:resnet20"}
    for name, (images, labels) in {"data": fashion("train", 512), "eval": fashion("t10k")}.items():
        found[name] = saved(f"fashion-{name}", input=images, labels=labels)
    return found


@dataclass(frozen=True)
class Network:
    """kind, title   of its loss
    data          the further options of a run
    window        tokens of a calibration sample
    """

    kind: Kind
    title: str
    data: Callable[[], dict[str, str]] = dict
    window: int = 512


NETWORKS = {
    "smollm2": Network("perplexity", "SmolLM2-135M, rise of perplexity"),
    "minilm": Network("cosine", "MiniLM, 1 − cosine", window=128),
    "mobilenet": Network("accuracy", "MobileNetV2, changed classes", photos),
    "digits": Network("accuracy", "digits, accuracy lost", digits),
    "resnet20": Network("accuracy", "ResNet-20, accuracy lost", fashion_images),
}
OWN_WEIGHTS = "resnet20"


def measured(
    name: str, options: dict[str, str], bits: int, group: int, target_size: int | None = None
) -> dict[str, Any]:
    """One run: bytes, quality, CPU-seconds before export, and what was predicted."""
    target, recipe = cached("mixed") / "run", cached("mixed") / f"{name}.yaml"
    recipe.write_text(RECIPE.format(bits=bits, group=group, window=NETWORKS[name].window), encoding="utf-8")
    began = time.process_time()
    report = run(RunOptions(**options, recipe=str(recipe), output=target, force=True, target_size=target_size,
                            progress=make_progress(silent=False))).report  # fmt: skip
    shutil.rmtree(target)
    found = {"bytes": report["size"]["bytes"], "loss": came_true(NETWORKS[name].kind, report["quality"]),
             "quality": report["quality"], "cpu_seconds": round(time.process_time() - began, 1)}  # fmt: skip
    allocation = report.get("allocation")
    if allocation:
        kept = ("target_size", "importance", "predicted_loss")
        widths = Counter(entry["stored"] for entry in allocation["tensors"].values())
        found |= {key: allocation[key] for key in kept} | {"widths": dict(sorted(widths.items()))}
        found["cpu_seconds_allocation"] = report["cost"]["allocation"]["cpu_seconds"]
    return found


def measure(
    name: str, weights: Path | None, results: dict[str, Any], bits: list[int], groups: list[int], again: bool
) -> None:
    options = {"model": str(weights or model_dir(name))} | NETWORKS[name].data()
    rows = results.setdefault(name, {"uniform": {}, "mixed": {}})
    for width, group in itertools.product(bits, groups):
        row = f"{width} bits, group {group}"
        if row not in rows["uniform"] or again:
            rows["uniform"][row] = measured(name, options, width, group)
            write_results("mixed", results)
    for row, uniform in rows["uniform"].items():
        if row not in rows["mixed"] or again:
            rows["mixed"][row] = measured(name, options, 4, 64, uniform["bytes"])
            write_results("mixed", results)
        mixed = rows["mixed"][row]
        best = min(
            (other for other in rows["uniform"].values() if other["bytes"] <= uniform["bytes"]), key=lambda o: o["loss"]
        )
        print(f"{name}, {uniform['bytes']:,} bytes: uniform {best['loss']:.4f}, mixed {mixed['loss']:.4f} "
              f"(predicted {mixed['predicted_loss']:.4f}) in {mixed['bytes']:,}", flush=True)  # fmt: skip


def mixed_table(results: dict[str, Any]) -> str:
    """A row for every size at which mixed precision was made, beside the best uniform setting of no more bytes."""
    rows: list[list[object]] = []
    for name, found in results.items():
        for entry in sorted(found["mixed"].values(), key=lambda entry: entry["target_size"]):
            target = entry["target_size"]
            fitting = {key: other for key, other in found["uniform"].items() if other["bytes"] <= target}
            best = min(fitting, key=lambda key: fitting[key]["loss"])
            rows.append([
                NETWORKS[name].title, f"{target:,}", f"{100 * (1 - entry['bytes'] / target):.2f} %", best,
                f"{100 * fitting[best]['loss']:.1f} %", f"{100 * entry['loss']:.1f} %",
                f"{100 * entry['predicted_loss']:.1f} %", number(entry["cpu_seconds"], 0),
            ])  # fmt: skip
    titles = ["network, its loss", "--target-size", "below it", "best uniform setting", "its loss", "mixed: loss",
              "predicted", "CPU-seconds"]  # fmt: skip
    return markdown(titles, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=[name for name in NETWORKS if name != OWN_WEIGHTS], choices=list(NETWORKS)
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], choices=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[32, 64, 128], choices=[32, 64, 128])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--weights", type=Path, help="the state dict of a trained ResNet-20")
    arguments = parser.parse_args()
    if OWN_WEIGHTS in arguments.models and not arguments.weights:
        parser.error(f"{OWN_WEIGHTS}: give --weights; bench_once.py leaves dense.pt")
    results = read_results("mixed")
    for name in arguments.models:
        weights = arguments.weights if name == OWN_WEIGHTS else None
        measure(name, weights, results, arguments.bits, arguments.groups, arguments.again)


if __name__ == "__main__":
    main()
