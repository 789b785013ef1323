#!/usr/bin/env python
"""How far a weight travels: the files that it is handed to on its way from a run to the artifact, by a trace of calls.

    scripts/travel.py                                      of this tree
    scripts/travel.py ../before . --write                  of two, and into docs/measured/travel.json

One weight of a small decoder is followed through a real run, `llm-2bit` in small: every call within the package is
looked at whose arguments are the tensor, its encoding, or a list, a dict, a record or a layer that holds one of them.
What such a call returns is followed further, where it has the weight's size or is an encoding of it.

    visits   those calls
    files    in which they are
    moves    from one file to another
    climbs   moves to a file of a higher floor: one that imports, itself or by others, more rows of files
    named    files in which calls are given its name, beside those
"""

from __future__ import annotations

import argparse
import dataclasses
import graphlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WEIGHT = "model.layers.1.mlp.up_proj.weight"
SETS = ("calibration.tokens=256", "calibration.window=32", "distill.steps=0", "evaluation.tokens=64",
        "evaluation.window=32", "trellis.width=4", "trellis.window=8", "trellis.group=16", "embeddings.group=16",
        "calibration.generated=0")  # fmt: skip
DEEP, WIDE = 2, 4096
"""Containers are looked into so deep, and where they have no more entries."""


class Travel:
    """A profiler that notes the files in which the weight is an argument."""

    def __init__(self, package: Path, name: str, shape: tuple[int, ...]) -> None:
        self.package, self.name, self.shape = f"{package}{os.sep}", name, shape
        self.visits: list[str] = []
        self.named: set[str] = set()
        self._followed: dict[int, Any] = {}  # kept, so that no other object gets the same number
        self._storages: set[int] = set()
        self._carrying: set[int] = set()

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(self.package):
            return
        if event == "call":
            given = self._arguments(frame)
            held = any(self._holds(value) for value in given)
            named = any(isinstance(value, str) and value == self.name for value in given)
            path = frame.f_code.co_filename.removeprefix(self.package)
            module = path.removesuffix(".py").replace(os.sep, ".")
            if held:
                self.visits.append(module)
            elif named:
                self.named.add(module)
            if held or named:
                self._carrying.add(id(frame))
        elif id(frame) in self._carrying:
            self._carrying.discard(id(frame))
            if self._is_the_weight(result):
                self._follow(result)

    def _arguments(self, frame: FrameType) -> list[Any]:
        code = frame.f_code
        n = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        return [frame.f_locals[name] for name in code.co_varnames[:n] if name in frame.f_locals]

    def _is_the_weight(self, value: Any) -> bool:
        import torch

        if isinstance(value, torch.Tensor):
            return not value.is_meta and sorted(value.shape) == sorted(self.shape)
        return _is_encoded(value)

    def _follow(self, value: Any) -> None:
        import torch

        self._followed[id(value)] = value
        if isinstance(value, torch.Tensor):
            self._storages.add(value.untyped_storage().data_ptr())

    def _holds(self, value: Any, depth: int = DEEP) -> bool:
        import torch

        if id(value) in self._followed:
            return True
        if isinstance(value, torch.Tensor):
            return not value.is_meta and value.untyped_storage().data_ptr() in self._storages
        if not depth:
            return False
        if isinstance(value, torch.nn.Module):
            return any(self._holds(each, 0) for each in value._parameters.values() if each is not None)
        if isinstance(value, dict):
            return len(value) <= WIDE and any(self._holds(each, depth - 1) for each in value.values())
        if isinstance(value, (list, tuple)):
            return len(value) <= WIDE and any(self._holds(each, depth - 1) for each in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = (getattr(value, field.name, None) for field in dataclasses.fields(value))
            return any(self._holds(each, depth - 1) for each in fields)
        return False


def _is_encoded(value: Any) -> bool:
    return any(kind.__name__ in ("EncodedTensor", "Encoding") for kind in type(value).__mro__)


def traced(model: Path, folder: Path) -> dict[str, list[str]]:
    """The visits of a run, and where the weight is named, by the package that is on the path."""
    import compressor

    try:
        from compressor.run.pipeline import run
    except ImportError:  # before there were rooms
        from compressor.pipeline import run
    from compressor.checkpoints import open_checkpoint
    from compressor.core.options import RunOptions

    shape = open_checkpoint(model).tensors[WEIGHT].shape
    texts = {name: str(folder / f"{name}.txt") for name in ("data", "eval")}
    options = RunOptions(model=str(model), recipe="llm-2bit", output=folder / "artifact", sets=SETS, **texts)
    travel = Travel(Path(compressor.__file__).parent, WEIGHT, shape)
    sys.setprofile(travel)
    try:
        run(options)
    finally:
        sys.setprofile(None)
    return {"visits": travel.visits, "named": sorted(travel.named)}


def floors(tree: Path) -> dict[str, int]:
    """Module -> the longest chain of modules below it, each imported when the one above is."""
    from scripts.draw_house import modules

    graph = {name: module.at_import - {name} for name, module in modules(tree / "compressor").items()}
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[below] for below in graph[name]), default=0)
    return found


def travelled(tree: Path) -> dict[str, Any]:
    """The figures of one tree, traced in a process of its own."""
    from tests import pico

    with tempfile.TemporaryDirectory(prefix="travel-") as scratch:
        folder = Path(scratch)
        model = pico.llama(folder / "llama")
        (folder / "data.txt").write_text(pico.text(1, 600))
        (folder / "eval.txt").write_text(pico.text(2, 300))
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COMPRESSOR_HOME": scratch}
        command = [sys.executable, "-P", __file__, "--trace", str(model), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return figures(**json.loads(done.stdout.splitlines()[-1]), floor=floors(tree))


def figures(visits: list[str], named: list[str], floor: dict[str, int]) -> dict[str, Any]:
    """Counts, and how often each file is visited, in the order of the first visit."""
    moves = [pair for pair in itertools.pairwise(visits) if pair[0] != pair[1]]
    climbs = sum(floor[there] > floor[here] for here, there in moves)
    each = {name: visits.count(name) for name in dict.fromkeys(visits)}
    counts = {"files": len(each), "moves": len(moves), "climbs": climbs, "visits": len(visits)}
    return counts | {"named": len(set(named) - set(visits)), "each": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", type=Path, nargs="*", default=[ROOT], help="this one by default")
    parser.add_argument("--write", action="store_true", help="of two trees: docs/measured/travel.json")
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trace:
        print(json.dumps(traced(*arguments.trees)))
        return
    sys.path.insert(0, str(ROOT))
    found = [travelled(tree.resolve()) for tree in arguments.trees]
    for tree, each in zip(arguments.trees, found, strict=True):
        counts = ", ".join(f"{each[key]} {key}" for key in ("files", "moves", "climbs", "visits", "named"))
        print(f"{tree}: {counts}")
        print("\n".join(f"  {n:4} {name}" for name, n in each["each"].items()))
    if arguments.write:
        before, after = found
        path = ROOT / "docs" / "measured" / "travel.json"
        path.write_text(json.dumps({"weight": WEIGHT, "before": before, "after": after}, indent=1) + "\n")


if __name__ == "__main__":
    main()
