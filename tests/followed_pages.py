"""Runs of the passes and the encoding that CONTRIBUTING.md and docs/encodings.md add, in a tree where they stand.

    python -m tests.followed_pages FOLDER

prints what each run came to as JSON; `tests/test_documents.py` makes the tree and judges it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from compressor.passes.settings.sign import SignSettings
from compressor.passes.settings.ternary import TernarySettings

import compressor
from compressor.checkpoints import open_checkpoint
from compressor.core.artifact import WEIGHTS, Artifact
from compressor.core.contract import Statistics
from compressor.core.errors import RecipeError
from compressor.core.spec import TernarySpec
from compressor.core.tensors import EncodedTensors
from compressor.export import int8_regions
from compressor.passes.registry import load_pass
from compressor.plan.planning import make_plan
from compressor.plan.recipe import Embeddings
from compressor.plan.recipe_file import load_recipe
from compressor.runtime.sessions import optimised_graph
from tests import pico

TEXT = """
passes:
  - {pass: affine, bits: 4, group: 32}
  - {pass: ternary, group: 32, select: ["*up_proj*", "*down_proj*"]}
  - {pass: sign, select: "*gate_proj*"}
calibration: {tokens: 1024, window: 64}
evaluation: {tokens: 512, window: 64, speed: false}
"""
IMAGES = """
passes: [{pass: ternary, group: row}, {pass: sign, per_row: false, select: "*conv2*"}]
export: {activations: ACTIVATIONS}
evaluation: {samples: 0, speed: false}
"""


def main(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs by name."""
    # Tables are stored by a section of the recipe, which knows the passes that are shipped.
    Embeddings.method = lambda self: TernarySettings(group=32)  # type: ignore[method-assign]
    Embeddings.spec = lambda self, name, rows: TernarySpec(group=32)  # type: ignore[method-assign]
    found = {}
    model = pico.llama(folder / "llama")
    (folder / "text.yaml").write_text(TEXT)
    for mode in ("default", "standard", "compat"):
        options: dict[str, Any] = {"mode": mode}
        if mode == "default":
            options |= {"target_size": 120_000, "sets": ("distill.steps=6", "distill.tokens=1024")}
        artifact = compressor.compress(model, str(folder / "text.yaml"), output=folder / mode, **options)
        found[mode] = facts(artifact)
        if mode == "default":
            found[mode] |= {"target": options["target_size"]} | learned(model, artifact)
    (folder / "pruned.yaml").write_text("passes: [{pass: gblm, score: magnitude}, {pass: sign}]")
    try:
        make_plan(open_checkpoint(model), load_recipe(folder / "pruned.yaml"))
    except RecipeError as error:
        found["pruned"] = {"refused": str(error)}
    pico.write_state_dict(pico.ResNet, folder / "resnet.pt")
    np.savez(folder / "images.npz", np.random.default_rng(0).normal(size=(32, 3, 12, 12)).astype(np.float32))
    int8_regions.convolution_times = lambda *_: (1e9, 1.0)  # in small networks int8 takes longer, and is not chosen
    for activations in ("int8", "static_int8"):
        (folder / "images.yaml").write_text(IMAGES.replace("ACTIVATIONS", activations))
        artifact = compressor.compress(
            folder / "resnet.pt", str(folder / "images.yaml"), output=folder / activations,
            data=str(folder / "images.npz"), arch="tests.pico:ResNet",
        )  # fmt: skip
        found[activations] = facts(artifact)
    return found


def facts(artifact: Artifact) -> dict[str, Any]:
    """Of an artifact: kinds of its tensors, what the proof found, its bytes, and what onnxruntime really runs."""
    tensors = EncodedTensors([artifact.directory / WEIGHTS])
    graph = ir.load(optimised_graph(artifact.directory / "model.onnx", artifact.directory)).graph
    return {
        "kinds": {name: tensors.describe(name)["kind"] for name in tensors},
        "proof": artifact.report["proof"],
        "bytes": artifact.report["size"]["bytes"],
        "operators": Counter(node.op_type for node in graph),
        "bits": sorted({node.attributes["bits"].as_int() for node in graph if node.op_type == "MatMulNBits"}),
    }


def learned(model: Path, artifact: Artifact) -> dict[str, Any]:
    """What an allocation and a distillation made of them, beside what the passes alone make."""
    tensors, checkpoint = EncodedTensors([artifact.directory / WEIGHTS]), open_checkpoint(model)
    widths: dict[str, float] = {}
    scales: dict[str, bool] = {}
    codes = []
    for name, chosen in artifact.report["allocation"]["tensors"].items():
        found = tensors[name].encoding
        if found.kind in ("ternary", "binary"):
            method = TernarySettings(group=found.group) if found.kind == "ternary" else SignSettings()
            alone = load_pass(method).encode(checkpoint.read(name), Statistics(), torch.Generator()).parts()
            widths[found.kind] = chosen["bits"]
            codes.append(torch.equal(alone["codes"], found.parts()["codes"]))
            other = not torch.equal(alone["scales"], found.parts()["scales"])
            scales[found.kind] = scales.get(found.kind, True) and other
    steps = max(entry["step"] for entry in artifact.report["learning"] if "step" in entry)
    return {"widths": widths, "learned": scales, "codes_stay": all(codes), "distilled": steps}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
