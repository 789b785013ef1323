#!/usr/bin/env python3
"""Writes docs/api.md: what may be called from Python, with signatures and docstrings as the source has them.

SECTIONS says what that is. Of a class the page has its fields and what has a docstring of its own; what a subclass only
implements stands at its base. Tests hold that the page is current, and that docstrings say what it promises.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "api.md"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Section:
    """A title, a few words, and what belongs to it: a module to its public names; () is the module's own docstring."""

    title: str
    about: str
    names: dict[str, tuple[str, ...]]


SECTIONS = (
    Section(
        "Compress",
        "`compressor.compress` and `compressor.load` are all that most need; everything else is imported from where it "
        "stands. Importing `compressor` costs nothing, and torch comes with the first use.",
        {
            "run.pipeline": ("compress", "run"),
            "core.options": ("RunOptions",),
            "run.prepare": ("prepare", "Prepared"),
            "core.artifact": ("Artifact", "damaged_files", "failed_directory"),
        },
    ),
    Section(
        "Use an artifact",
        "An artifact is data: none of these calls code that it names.",
        {
            "export.loading": ("load",),
            "evaluate.judge": ("evaluate",),
            "evaluate.verification": ("verify", "Check", "failures"),
            "evaluate.again": ("Given",),
            "core.tensors": ("EncodedTensors", "EncodedTensor", "Place", "write_tensors"),
        },
    ),
    Section(
        "Progress and log",
        "A run says what it does to its `progress`, by default to the log.",
        {"core.log": (), "core.progress": ("Progress", "Task", "LineProgress", "BarProgress", "make_progress")},
    ),
    Section("Errors", "Whatever is wrong with what a caller gives is one of these.", {"core.errors": ()}),
    Section(
        "Write a pass: its settings",
        "[CONTRIBUTING.md](../CONTRIBUTING.md#write-a-pass-in-an-hour) walks through one.",
        {
            "core.passes": (
                "Pass", "WeightSettings", "PruningSettings", "StructureSettings", "BlockLearning", "Moves", "Rates",
            ),
            "core.training": ("Training", "FittedSettings"),
        },
    ),
    Section(
        "Write a pass: its work",
        "Matrices are (rows = outputs, columns = inputs), float32.",
        {
            "core.contract": (
                "Statistics", "WeightPass", "TrainedPass", "PruningPass", "Pruned", "StructurePass", "Learnable",
            ),
            "core.structure": ("Subject", "Outcome", "Layer", "Surgeon", "MakesTrainer"),
            "core.groups": ("Group", "Member"),
            "core.follower": ("Follower", "Trainer"),
        },
    ),
    Section(
        "Encodings",
        "How a matrix is stored. To write one: [encodings.md](encodings.md); the bytes: [formats.md](formats.md).",
        {
            "core.encoding": (
                "Encoding", "Layout", "Dense", "Scaled", "Scales", "Affine", "Binary", "Codebook", "Sparse", "Refined",
                "describe", "restore",
            ),
        },
    ),
    Section(
        "Specs",
        "How a matrix will be stored, from its shape alone and without torch.",
        {
            "core.spec": (
                "Spec", "DenseSpec", "AffineSpec", "CodebookSpec", "BinarySpec", "SparseSpec", "RefinedSpec",
                "group_columns", "code_parts", "scale_parts",
            ),
        },
    ),
)  # fmt: skip


def path_of(module: str) -> Path:
    """The file of a module, by its name without `compressor.`."""
    return ROOT / "compressor" / f"{module.replace('.', '/')}.py"


@cache
def tree_of(module: str) -> ast.Module:
    """Its syntax."""
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def definition(module: str, name: str) -> ast.ClassDef | Function:
    """Of a public name of a module."""
    found = [node for node in tree_of(module).body if isinstance(node, ast.ClassDef | Function) and node.name == name]
    assert found, f"{module} has no {name}"
    return found[-1]


def documented() -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """What the page has: module and definition."""
    for section in SECTIONS:
        for module, names in section.names.items():
            yield from ((module, definition(module, name)) for name in names)


def members(node: ast.ClassDef) -> Iterator[Function]:
    """The public functions and properties of a class."""
    return (each for each in node.body if isinstance(each, Function) and not each.name.startswith("_"))


def _lines(module: str, first: int, last: int) -> list[str]:
    lines = path_of(module).read_text(encoding="utf-8").splitlines()[first - 1 : last]
    return [line.replace("  # fmt: skip", "").rstrip() for line in lines]


def _head(module: str, node: ast.ClassDef | Function) -> list[str]:
    """From the first decorator to the end of the docstring."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    body = node.body[0]
    last = body.end_lineno if ast.get_docstring(node) is not None else max(body.lineno - 1, node.lineno)
    assert last is not None
    return _lines(module, first, last)


def _is_field(node: ast.stmt) -> bool:
    """Whether a statement of a class is a public attribute."""
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    names = [each.id for each in node.targets if isinstance(each, ast.Name)] if isinstance(node, ast.Assign) else []
    return bool(names) and not names[0].startswith("_") and names[0] != "model_config"


def source_of(module: str, node: ast.ClassDef | Function) -> list[str]:
    """A definition as the page has it: without bodies, and of a class what is public."""
    lines = _head(module, node)
    if not isinstance(node, ast.ClassDef):
        return lines
    fields: list[str] = []
    for each, following in zip(node.body, [*node.body[1:], None], strict=True):
        if _is_field(each):
            text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert each.end_lineno is not None
            last = following.end_lineno if text and following is not None else each.end_lineno
            fields += _lines(module, each.lineno, last or each.end_lineno)
    if fields:
        lines += ["", *fields]
    for each in members(node):
        if ast.get_docstring(each) is not None:
            lines += ["", *_head(module, each)]
    return lines


def page() -> str:
    """The whole page."""
    parts = [
        "# From Python",
        "Made by scripts/make_api_docs.py from the docstrings; do not edit. Lists in docstrings are of fields and "
        "arguments; shapes stand in parentheses, sizes are bytes and shares lie between 0 and 1.",
    ]
    for section in SECTIONS:
        parts += [f"## {section.title}", section.about]
        for module, names in section.names.items():
            file = path_of(module).relative_to(ROOT).as_posix()
            if not names:
                text = ast.get_docstring(tree_of(module))
                parts += [f"### `compressor.{module}`", f"In [{file}](../{file}).", f"```text\n{text}\n```"]
            for name in names:
                source = "\n".join(source_of(module, definition(module, name)))
                parts += [f"### `compressor.{module}.{name}`", f"In [{file}](../{file}).", f"```python\n{source}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
