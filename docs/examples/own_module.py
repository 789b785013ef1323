#!/usr/bin/env python
"""A network of one's own, in memory, to ONNX with weights of 8 bits, and what that costs in accuracy.

    python own_module.py FOLDER

Trains a small convolutional network on pictures of stripes (some seconds), compresses it by the recipe cnn-int8, and
runs the artifact in plain onnxruntime. It computes on int8 as well where that is faster, which takes a network larger
than this one. For a network of yours: the module in place of `Stripes`, and some hundred
inputs of the kind that it sees, with labels if there are any, in place of `pictures`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import compressor

N_CLASSES = 6
SIDE = 24


class Stripes(nn.Module):
    """Pictures (batch, 1, 24, 24) to the direction of their stripes, 6 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, N_CLASSES)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(picture).mean((2, 3)))


def pictures(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy stripes, float32 (n, 1, 24, 24), and the number of their direction, int64 (n,)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, N_CLASSES, n)
    angle = (labels * np.pi / N_CLASSES)[:, None, None]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    phase = generator.uniform(0, 2 * np.pi, (n, 1, 1))
    clean = np.sin(0.9 * (columns * np.cos(angle) + rows * np.sin(angle)) + phase)
    noisy = clean + 2.5 * generator.standard_normal((n, SIDE, SIDE))
    return noisy[:, None].astype(np.float32), labels


def trained(steps: int = 150) -> Stripes:
    """The network after a short training."""
    torch.manual_seed(0)
    network = Stripes()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    inputs, labels = map(torch.from_numpy, pictures(1600, seed=0))
    for step in range(steps):
        at = torch.arange(64 * step, 64 * (step + 1)) % len(inputs)
        loss = nn.functional.cross_entropy(network(inputs[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def main(folder: Path) -> None:
    """Makes everything in `folder`, and prints sizes and accuracies."""
    folder.mkdir(parents=True, exist_ok=True)
    network = trained()
    for name, n, seed in (("calibration", 256, 1), ("evaluation", 256, 2)):
        inputs, labels = pictures(n, seed)
        np.savez(folder / f"{name}.npz", picture=inputs, labels=labels)

    artifact = compressor.compress(
        network, "cnn-int8", data=str(folder / "calibration.npz"), eval=str(folder / "evaluation.npz"),
        output=folder / "small", sets=("gates.min_agreement=0.95",), force=True,
    )  # fmt: skip

    inputs, labels = pictures(512, seed=3)  # seen by neither
    session = onnxruntime.InferenceSession(str(artifact.directory / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs}
    found = session.run(None, feed)[0].argmax(1)
    with torch.no_grad():
        original = network(torch.from_numpy(inputs)).argmax(1).numpy()
    sizes = artifact.report["size"]
    print(f"bytes: {sizes['original_bytes']:,} -> {sizes['bytes']:,}")
    print(f"right of 512: {(original == labels).sum()} -> {(found == labels).sum()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    logging.basicConfig()
    logging.getLogger("compressor").setLevel("INFO")  # each stage of the run, on stderr
    main(parser.parse_args().folder)
