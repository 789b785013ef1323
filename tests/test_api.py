"""docs/api.md is what the docstrings say, and they say what a caller has to know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import compressor
from scripts import make_api_docs
from scripts.make_api_docs import Function

DOCUMENTED = list(make_api_docs.documented())
CLASSES = {node.name: node for _, node in DOCUMENTED if isinstance(node, ast.ClassDef)}


def bases(node: ast.ClassDef) -> list[ast.ClassDef]:
    """The classes of the page that a class is one of, itself first."""
    named = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return [node, *(each for name in named if name in CLASSES for each in bases(CLASSES[name]))]


def functions() -> list[tuple[str, Function]]:
    """Every function of the page with its name there."""
    found = []
    for module, node in DOCUMENTED:
        inner = list(make_api_docs.members(node)) if isinstance(node, ast.ClassDef) else [node]
        owner = f"{module}.{node.name}." if isinstance(node, ast.ClassDef) else f"{module}."
        found += [(owner + each.name, each) for each in inner]
    return found


DESCRIBED = [(name, node, text) for name, node in functions() if (text := ast.get_docstring(node)) is not None]


def says(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){word}(?!\w)", text) is not None


def test_the_page_is_what_the_docstrings_say():
    assert (make_api_docs.TARGET).read_text(encoding="utf-8") == make_api_docs.page(), "run scripts/make_api_docs.py"


def test_what_the_package_itself_offers_is_on_the_page():
    offered = {f"{compressor._HOMES[name]}.{name}" for name in compressor.__all__}
    assert offered <= {f"compressor.{module}.{node.name}" for module, node in DOCUMENTED}


def test_what_pages_tell_people_to_import_is_on_the_page():
    root, imported = Path(__file__).parents[1], set()
    for page in ("CONTRIBUTING.md", "README.md", "docs/encodings.md"):
        for module, names in re.findall(
            r"from compressor\.([\w.]+) import ([\w, ]+)", (root / page).read_text(encoding="utf-8")
        ):
            imported |= {(module, name) for name in names.split(", ") if make_api_docs.path_of(module).exists()}
    have = {(module, node.name) for module, node in DOCUMENTED}
    types = {"Role", "Group", "Ternary", "TernarySpec"}  # names of types, and what the page itself adds
    assert len(imported) > 5
    assert {(module, name) for module, name in imported if name not in types} <= have


def test_every_public_function_has_a_docstring_or_its_base_has():
    lacking = []
    for module, node in DOCUMENTED:
        if not isinstance(node, ast.ClassDef):
            continue
        told = {each.name for base in bases(node) for each in make_api_docs.members(base) if ast.get_docstring(each)}
        lacking += [
            f"{module}.{node.name}.{each.name}" for each in make_api_docs.members(node) if each.name not in told
        ]
    assert not lacking


def test_every_function_names_its_parameters():
    silent = []
    for name, node, text in DESCRIBED:
        every = node.args
        parameters = [
            each for each in (*every.posonlyargs, *every.args, every.vararg, *every.kwonlyargs, every.kwarg) if each
        ]
        silent += [
            f"{name}: {each.arg}" for each in parameters if each.arg not in ("self", "cls") and not says(text, each.arg)
        ]
    assert not silent


def test_every_function_names_the_errors_that_it_raises():
    silent = []
    for name, node, text in DESCRIBED:
        calls = [each.exc for each in ast.walk(node) if isinstance(each, ast.Raise)]
        raised = {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
        silent += [f"{name}: {error}" for error in sorted(raised) if not says(text, error)]
    assert not silent


def test_every_field_is_told_by_its_class_or_itself():
    silent = []
    for module, node in DOCUMENTED:
        if not isinstance(node, ast.ClassDef):
            continue
        text = "\n".join(ast.get_docstring(base) or "" for base in bases(node))
        for each, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
                continue
            own = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if not each.target.id.startswith("_") and not own and not says(text, each.target.id):
                silent.append(f"{module}.{node.name}.{each.target.id}")
    assert not silent
