#!/usr/bin/env python
"""Mixed precision beside the best uniform setting of the same size, on four networks.

    scripts/fetch_material smollm2 minilm digits photos fashion
    pip install pillow
    scripts/bench_mixed.py [--models digits minilm smollm2] [--again]
    scripts/bench_once.py --epochs 6          trains the ResNet-20 of
    scripts/bench_mixed.py --models resnet20 --weights …/dense.pt

For each network every uniform setting (bits × group) is run, then mixed precision at the size of several of them, with
--target-size. The quality is that of held-out data in compression.json: the loss of `losses.Kind`. Digits are MNIST
pictures, turned and moved, ten to calibrate on and ten others to evaluate; the ResNet-20 is calibrated on 512 images of
Fashion-MNIST's training set and evaluated on its 10,000 test images. Results go to docs/measured/mixed.json.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from bench_once import fashion
from material import model_dir
from measured import cached, markdown, number, read_results, write_results

from compressor.core.options import RunOptions
from compressor.gates import came_true
from compressor.losses import Kind
from compressor.pipeline import run
from compressor.progress import make_progress

RECIPE = """
passes: [{{pass: affine, method: gptq, bits: 4, group: 64, zero: {zero}, scale_bits: 8}}]
calibration: {{tokens: 8192, window: {window}, samples: 256}}
embeddings: {{bits: 4, group: 64, zero: {zero}, scale_bits: 8}}
evaluation: {{tokens: {tokens}, window: 512, samples: 10000}}
"""
KINDS: dict[str, Kind] = {
    "smollm2": "perplexity", "minilm": "cosine", "resnet20": "accuracy", "digits": "accuracy",
}  # fmt: skip
TITLES = {
    "smollm2": "SmolLM2-135M, rise of perplexity", "minilm": "MiniLM, 1 − cosine", "digits": "digits, accuracy lost",
    "resnet20": "ResNet-20, accuracy lost",
}  # fmt: skip


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


def digits() -> dict[str, Any]:
    folder, files = cached("mixed"), sorted(model_dir("photos").glob("mnist_*.png"))
    for name, part, n, seed in (("calibration", files[::2], 512, 0), ("evaluation", files[1::2], 1000, 1)):
        x, labels = turned(part, n, seed)
        np.savez(folder / f"{name}.npz", x=x, labels=labels)
    return {
        "data": str(folder / "calibration.npz"), "eval": str(folder / "evaluation.npz"),
        "arch": "scripts.networks:digit_cnn",
    }  # fmt: skip


def fashion_images() -> dict[str, Any]:
    folder = cached("mixed")
    for name, (images, labels) in {"train": fashion("train", 512), "test": fashion("t10k")}.items():
        np.savez(folder / f"fashion-{name}.npz", input=images, labels=labels)
    return {
        "data": str(folder / "fashion-train.npz"), "eval": str(folder / "fashion-test.npz"),
        "arch": "networks:resnet20",
    }  # fmt: skip


def options_of(name: str, weights: Path | None) -> dict[str, Any]:
    """The model, its data, and its recipe."""
    text = RECIPE.format(zero="learned", window=128 if name == "minilm" else 512, tokens=16384)
    recipe = cached("mixed") / f"{name}.yaml"
    recipe.write_text(text, encoding="utf-8")
    data = digits() if name == "digits" else fashion_images() if name == "resnet20" else {}
    return {"model": str(weights or model_dir(name)), "recipe": str(recipe)} | data


def measured(name: str, settings: dict[str, Any], sets: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """One run: bytes, quality, CPU-seconds before export, and what was predicted."""
    target = cached("mixed") / "run"
    began = time.process_time()
    report = run(RunOptions(**settings, output=target, force=True, sets=sets, progress=make_progress(silent=False),
                            **changes)).report  # fmt: skip
    shutil.rmtree(target)
    found = {"bytes": report["size"]["bytes"], "loss": came_true(KINDS[name], report["quality"]),
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
    settings, rows = options_of(name, weights), results.setdefault(name, {"uniform": {}, "mixed": {}})
    for width, group in itertools.product(bits, groups):
        row = f"{width} bits, group {group}"
        if row not in rows["uniform"] or again:
            sets = tuple(f"{part}.{key}={value}" for part in ("affine", "embeddings")
                         for key, value in (("bits", width), ("group", group)))  # fmt: skip
            rows["uniform"][row] = measured(name, settings, sets)
            write_results("mixed", results)
    for row, uniform in rows["uniform"].items():
        if row not in rows["mixed"] or again:
            rows["mixed"][row] = measured(name, settings, target_size=uniform["bytes"])
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
                TITLES[name], f"{target:,}", f"{100 * (1 - entry['bytes'] / target):.2f} %", best,
                f"{100 * fitting[best]['loss']:.1f} %", f"{100 * entry['loss']:.1f} %",
                f"{100 * entry['predicted_loss']:.1f} %", number(entry["cpu_seconds"], 0),
            ])  # fmt: skip
    titles = ["network, its loss", "--target-size", "below it", "best uniform setting", "its loss", "mixed: loss",
              "predicted", "CPU-seconds"]  # fmt: skip
    return markdown(titles, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=[name for name in KINDS if name != "resnet20"], choices=list(KINDS)
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], choices=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[32, 64, 128], choices=[32, 64, 128])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--weights", type=Path, help="the state dict of a trained ResNet-20")
    arguments = parser.parse_args()
    if "resnet20" in arguments.models and not arguments.weights:
        parser.error("resnet20: give --weights; bench_once.py leaves dense.pt")
    results = read_results("mixed")
    for name in arguments.models:
        measure(
            name,
            arguments.weights if name == "resnet20" else None,
            results,
            arguments.bits,
            arguments.groups,
            arguments.again,
        )


if __name__ == "__main__":
    main()
