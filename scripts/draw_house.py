#!/usr/bin/env python
"""The rooms of the package and the imports between them: the rule, and docs/house.svg drawn from the same table.

scripts/draw_house.py            writes docs/house.svg
scripts/draw_house.py --count    prints rooms, modules, floors of imports and circles
"""

from __future__ import annotations

import argparse
import ast
import graphlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "compressor"

RULE: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("batch", "run"),
    ("evaluate",),
    ("widths",),
    ("structure", "sweeps"),
    ("learning",),
    ("data", "report", "export"),
    ("plan",),
    ("checkpoints", "onnx"),
    ("graph", "passes", "runtime"),
    ("core",),
    ("ops",),
)
"""From the top down: a room imports lower rooms only."""
ROOMS = {room: row for row, rooms in enumerate(RULE) for room in rooms} | {"": -1}
"""Room -> its row; "" is the package's own face, `compressor` and `python -m compressor`."""


@dataclass(frozen=True)
class Module:
    """A file: the modules of the package that it imports, those when it is imported itself, and libraries then."""

    imported: frozenset[str]
    at_import: frozenset[str]
    libraries: frozenset[str]


def room_of(module: str) -> str:
    """`cli` of `cli.commands`; "" of what lies in no folder."""
    return module.split(".")[0] if "." in module or (PACKAGE / module).is_dir() else ""


@cache
def modules() -> dict[str, Module]:
    """Every file of the package, by its name without `compressor.`; the package itself is `__init__`."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return {name: _read(path, set(paths)) for name, path in paths.items()}


def imports_of(module: str, at_import: bool = False) -> frozenset[str]:
    """The modules that one imports; `at_import` without those inside of functions and for type checkers."""
    found = modules()[module]
    return found.at_import if at_import else found.imported


def _read(path: Path, known: set[str]) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later: set[int] = set()
    for node in ast.walk(tree):
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            later |= {id(child) for child in ast.walk(node)}
    everywhere: set[str] = set()
    at_import: set[str] = set()
    for node in ast.walk(tree):
        names = _named(node, known)
        everywhere |= names
        at_import |= set() if id(node) in later else names
    ours = {name.removeprefix("compressor.") for name in everywhere if name.startswith("compressor.")} & known
    first = {name.removeprefix("compressor.") for name in at_import if name.startswith("compressor.")} & known
    libraries = {name.split(".")[0] for name in at_import} - {"compressor"}
    return Module(frozenset(ours), frozenset(first), frozenset(libraries))


def _named(node: ast.AST, known: set[str]) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name for name in inner if name.removeprefix("compressor.") in known} or {node.module}
    return set()


def count() -> dict[str, int]:
    """How large the house is: rooms, modules, arrows between rooms, floors of imports, circles."""
    graph = {name: imports_of(name) for name in modules()}
    arrows = {(room_of(a), room_of(b)) for a, found in graph.items() for b in found if room_of(a) != room_of(b)}
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
        circles = 0
    except graphlib.CycleError:
        circles = 1
    floors = 0
    while not circles and sorter.is_active():
        ready = sorter.get_ready()
        sorter.done(*ready)
        floors += 1
    return {"rooms": len(ROOMS) - 1, "modules": len(graph), "arrows between rooms": len(arrows), "floors": floors,
            "circles": circles}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true")
    arguments = parser.parse_args()
    if arguments.count:
        print("\n".join(f"{name}: {number}" for name, number in count().items()))
