#!/usr/bin/env python
"""Do two versions of the code write the same bytes? Seven recipes on small networks, by each, compared file by file.

    git worktree add ../before main
    scripts/compare_trees.py ../before .

Everything has to be equal but what compression.json says of cost, speed and whose run it was, and the hash over that.
Speed is not measured, where the tree's recipes have `evaluation.speed` to leave it out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests import pico  # noqa: E402
from tests.onnx import graphs  # noqa: E402

ARRAYS = ("--data", "calibration.npz", "--eval", "evaluation.npz", "--arch", "tests.pico:ResNet")
LABELLED = ("--data", "labelled.npz", "--eval", "labelled-evaluation.npz", "--arch", "tests.pico:ResNet")
TEXT = ("--set", "calibration.window=64", "--set", "evaluation.window=64", "--set", "evaluation.tokens=1024")
RUNS: dict[str, tuple[str, ...]] = {
    "llm": ("llama", "-r", "llm-2bit", *TEXT, "--set", "distill.steps=12", "--set", "distill.tokens=4096",
            "--set", "calibration.tokens=2048"),
    "llm-compat": ("llama", "-r", "llm-4bit", "--compat", *TEXT, "--set", "calibration.tokens=1024"),
    "encoder": ("bert", "-r", "encoder-4bit", *TEXT, "--set", "calibration.tokens=2048"),
    "cnn": ("resnet.pt", "-r", "cnn-int8", *ARRAYS),
    "onnx": ("images.onnx", "-r", "cnn-4bit", "--data", "images.npz", "--eval", "images-evaluation.npz"),
    "structure": ("resnet.pt", "-r", "cnn-explain", *ARRAYS),
    "training": ("resnet.pt", "-r", "cnn-once", *LABELLED, "--set", "hesso.epochs=2", "--set", "hesso.batch=16",
                 "--set", "hesso.periods=4"),
}  # fmt: skip
OF_THE_RUN = ("cost", "speed", "original_speed", "identity", "versions", "compressor", "seal")


def make_sources(folder: Path) -> None:
    """The networks and data, the same for both trees."""
    pico.llama(folder / "llama")
    config = transformers.BertConfig(
        vocab_size=pico.VOCABULARY, hidden_size=72, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=256,
    )  # fmt: skip
    pico.saved(config, transformers.BertForMaskedLM, folder / "bert")
    pico.write_state_dict(pico.ResNet, folder / "resnet.pt")
    graphs.images(folder)
    generator = np.random.default_rng(0)
    for name, n in (("calibration", 32), ("evaluation", 16)):
        np.savez(folder / f"{name}.npz", generator.normal(size=(n, 3, 12, 12)).astype(np.float32))
        pixels = generator.normal(size=(n, 3, 16, 16)).astype(np.float32)
        np.savez(folder / f"images{'' if n == 32 else '-evaluation'}.npz", pixels=pixels)
        x, labels = generator.normal(size=(4 * n, 3, 12, 12)).astype(np.float32), generator.integers(0, 10, 4 * n)
        np.savez(folder / f"labelled{'' if n == 32 else '-evaluation'}.npz", x=x, labels=labels)


def compress(tree: Path, sources: Path, output: Path, run: str, more: Mapping[str, str] | None = None) -> None:
    """One recipe by the code of one tree, with `more` variables in its environment."""
    recipe = json.loads(called(tree, sources, "recipes", RUNS[run][2], "--json"))
    unmeasured = ("--set", "evaluation.speed=false") if "speed" in recipe["evaluation"] else ()
    called(tree, sources, *RUNS[run], *unmeasured, "-o", str(output / run), more=more)


def called(tree: Path, folder: Path, *arguments: str, more: Mapping[str, str] | None = None) -> str:
    """What the command of one tree prints."""
    path = f"{tree}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(more or {})}
    command = [sys.executable, "-P", "-m", "compressor", *arguments]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{tree}, {' '.join(arguments)}: status {found.returncode}\n{found.stderr[-2000:]}")
    return found.stdout


def description(path: Path) -> dict[str, Any]:
    """compression.json without what is of the one run."""
    found = json.loads(path.read_text(encoding="utf-8"))
    hashes = found.get("sha256", {})
    found["recipe"]["evaluation"].pop("speed", None)
    found["source"].pop("path", None)  # of the folder that the run was in, as the data's are
    given = found.get("data", {}).get("arguments", {})
    given |= {name: Path(path).name for name, path in given.items() if path is not None}
    return {key: value for key, value in found.items() if key not in OF_THE_RUN} | {"sha256": hashes}


def differences(before: Path, after: Path) -> list[str]:
    """Names of files that differ, or that one has alone."""
    names = {str(path.relative_to(folder)) for folder in (before, after) for path in folder.rglob("*")}
    found = []
    for name in sorted(names - {"report.html", "README.md"}):
        first, second = before / name, after / name
        if not (first.exists() and second.exists()):
            found.append(f"{name} (only {'before' if first.exists() else 'after'})")
        elif first.is_file() and name == "compression.json":
            old, new = description(first), description(second)
            found += [f"{name}: {key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        elif first.is_file() and first.read_bytes() != second.read_bytes():
            found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--keep", type=Path, help="where the artifacts of `before` are kept for the next comparison")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sources = arguments.keep or Path(scratch)
        if not (sources / "images.onnx").exists():
            sources.mkdir(exist_ok=True)
            make_sources(sources)
        status = 0
        for run in arguments.only:
            if not (sources / "before" / run).exists():
                compress(arguments.before.resolve(), sources, sources / "before", run)
            compress(arguments.after.resolve(), sources, Path(scratch) / "after", run)
            found = differences(sources / "before" / run, Path(scratch) / "after" / run)
            print(f"{run:12} {'the same' if not found else '; '.join(found)}", flush=True)
            status |= bool(found)
    sys.exit(status)


if __name__ == "__main__":
    main()
