#!/usr/bin/env python
"""Real networks as ONNX graphs, compressed by a recipe, and as the checkpoints that they were exported from.

    scripts/fetch_material digits minilm photos magika
    scripts/bench_onnx.py [digits] [minilm] [magika]

Bytes and quality of both artifacts, on the same data; how far the artifact is from its own graph with the decoded
weights, in onnxruntime. magika's graph is its makers' own, by tf2onnx; there is no checkpoint beside it, and its inputs
are bytes at random. Results go to docs/measured/onnx.json.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bench_mixed import turned
from material import model_dir
from measured import markdown, number, read_results, write_results

from compressor.checkpoints import open_checkpoint
from compressor.core.options import RunOptions
from compressor.run.pipeline import run

FREE = torch.export.Dim.DYNAMIC
RECIPES = {"digits": ("cnn-4bit", "cnn-int8"), "minilm": ("encoder-4bit",), "magika": ("encoder-4bit",)}
TITLES = {"digits": "digit CNN", "minilm": "MiniLM", "magika": "magika"}


def onnx_table(results: dict[str, Any]) -> str:
    """A row for each network and recipe."""
    titles = ["network", "recipe", "graph, MB", "artifact, MB", "quality", "from the checkpoint, MB", "quality",
              "error against its own graph", "CPU, s"]  # fmt: skip
    rows = []
    for name, recipes in results.items():
        for recipe, each in recipes.items():
            beside = each.get("checkpoint") or {}
            rows.append([
                TITLES[name], f"`{recipe}`", number(each["original_bytes"] / 1e6), number(each["bytes"] / 1e6, 2),
                each["quality"], number(beside["bytes"] / 1e6, 2) if beside else None, beside.get("quality"),
                f"{each['exact_error']:.1g}", number(each["cpu_seconds"], 0),
            ])  # fmt: skip
    return markdown(titles, rows)


class Encoder(torch.nn.Module):
    """Last hidden states, by position: what torch.onnx can trace."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids, attention_mask, token_type_ids):
        found = self.network(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return found.last_hidden_state


def export(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...], free: int, path: Path
) -> Path:
    """By torch.onnx, compared with the module on other inputs; the first `free` axes of every input are open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        module.eval(), inputs, path, dynamic_shapes=tuple(dict.fromkeys(range(free), FREE) for _ in inputs),
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, dict(zip(names, map(np.asarray, others), strict=True)))[0]
    with torch.no_grad():
        error = float(np.abs(found - module(*others).numpy()).max())
    if error > 1e-3:
        sys.exit(f"{path}: differs from its network by {error:.2g}")
    return path


def case(name: str, folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The graph, its data, and the checkpoint beside it with what that needs."""
    if name == "digits":
        files = sorted(model_dir("photos").glob("mnist_*.png"))
        data = {}
        for key, part, n, seed in (("data", files[::2], 256, 0), ("eval", files[1::2], 1000, 1)):
            x, labels = turned(part, n, seed)
            np.savez(folder / f"{key}.npz", x=x, labels=labels)
            data[key] = str(folder / f"{key}.npz")
        arch = "scripts.networks:digit_cnn"
        module = open_checkpoint(model_dir(name), arch=arch).build("cpu")
        graph = export(
            module, (torch.zeros(2, 1, 28, 28),), (torch.from_numpy(x[:8]).float(),), 1, folder / "digits.onnx"
        )
        return graph, data, data | {"model": str(model_dir(name)), "arch": arch}
    if name == "minilm":
        source = model_dir(name)
        # Tensors of their own: torch.export reads one input for all that are given the same object.
        inputs = (torch.arange(32).view(2, 16), torch.ones(2, 16, dtype=torch.int64), torch.zeros(2, 16).long())
        mask, types = torch.ones(3, 20, dtype=torch.int64), torch.zeros(3, 20, dtype=torch.int64)
        mask[1, 12:], types[2, 9:] = 0, 1
        others = (1000 + torch.arange(60).view(3, 20), mask, types)
        encoder = Encoder(open_checkpoint(source).build("cpu"))
        graph = export(encoder, inputs, others, 2, folder / "minilm/model.onnx")
        for file in source.glob("*token*"):
            shutil.copy(file, graph.parent)
        shutil.copy(source / "vocab.txt", graph.parent)
        return graph, {}, {"model": str(source)}
    graph = next(model_dir(name).glob("standard*/model.onnx"))
    for key, seed in (("data", 0), ("eval", 1)):
        content = np.random.default_rng(seed).integers(0, 257, (128, 2048)).astype(np.int32)
        np.savez(folder / f"{key}.npz", bytes=content)
    return graph, {key: str(folder / f"{key}.npz") for key in ("data", "eval")}, {}


def quality(report: dict[str, Any]) -> str:
    found = report["quality"]
    if "cosine" in found:
        return f"cosine {found['cosine']:.4f}"
    agreement = f"agreement {found['top1_agreement']:.3f}"
    return agreement if found["accuracy"] is None else f"{agreement}, accuracy {found['accuracy']:.3f}"


def measured(recipe: str, target: Path, **options: Any) -> dict[str, Any]:
    began = time.process_time()
    report = run(RunOptions(recipe=recipe, output=target, force=True, **options)).report
    return {
        "bytes": report["size"]["bytes"], "original_bytes": report["size"]["original_bytes"],
        "quality": quality(report), "exact_error": report["proof"]["exact"]["max_relative_error"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(RECIPES))
    for name in parser.parse_args().networks:
        with tempfile.TemporaryDirectory() as scratch:
            graph, data, checkpoint = case(name, Path(scratch))
            for recipe in RECIPES[name]:
                found = measured(recipe, Path(scratch) / "out", model=str(graph), **data)
                if checkpoint:
                    found["checkpoint"] = measured(recipe, Path(scratch) / "beside", **checkpoint)
                results = read_results("onnx")
                write_results("onnx", results | {name: results.get(name, {}) | {recipe: found}})
                print(name, recipe, found, flush=True)


if __name__ == "__main__":
    main()
