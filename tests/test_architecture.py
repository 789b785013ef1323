"""One direction of imports, read from the sources: whoever reads a module need not know who uses it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "compressor"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A module imports only from its own row and the rows below it.
LAYERS = (
    ("__main__", "cli"),
    ("batch", "verification"),
    ("failure", "inspection", "tables", "examples", "generation", "summary"),
    ("pipeline",),
    ("delivery",),
    ("learn", "judge", "original", "gates", "blame", "clock", "workplace", "structure"),
    ("allocate", "sensitivity", "encode", "generated", "samples"),
    ("students",),
    ("report", "evaluate", "fitting"),
    (
        "aim",
        "calibrate",
        "ladder",
        "losses",
        "survey",
        "shares",
        "gradients",
        "backward",
        "training",
        "settled",
        "streaming",
    ),
    ("manifest", "workers", "fingerprint"),
    ("export", "passes"),
    ("plan", "planned", "estimates", "footprint", "recipe", "recipe_file"),
    ("graph", "checkpoints", "data"),
    ("progress", "inference", "parallel"),
    ("core",),
    ("ops",),
)
RANK = {name: -row for row, names in enumerate(LAYERS) for name in names}


def imports(module: str, everywhere: bool = True) -> set[str]:
    """The modules of the package that a module imports; without `everywhere` not those inside of functions."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not everywhere
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if inner or typing:
            skipped |= {id(child) for child in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    return {name for name in found if name.split(".")[0] == "compressor"}


def part(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_part_has_its_place():
    assert {part(module) for module in MODULES} - {"__init__"} <= RANK.keys()


@pytest.mark.parametrize("module", [name for name in MODULES if name != "compressor"])
def test_nothing_imports_upward(module):
    above = [name for name in imports(module) if part(name) != "__init__" and RANK[part(name)] > RANK[part(module)]]
    assert not above


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in ("core", "ops")])
def test_core_and_ops_know_no_network_file_or_paper(module):
    assert {part(name) for name in imports(module)} <= {"core", "ops"}
    if part(module) == "ops":
        assert {part(name) for name in imports(module)} <= {"ops"}


PASSES = [name for name in MODULES if name.startswith("compressor.passes.")]


@pytest.mark.parametrize("module", PASSES)
def test_a_pass_stands_on_core_and_ops_alone(module):
    assert {part(name) for name in imports(module)} <= {"core", "ops"}


# The pipeline's files and torch: a command that only reads a recipe or a header must start in a moment.
WITHOUT_TORCH = (
    "cli", "recipe", "recipe_file", "plan", "inspection", "progress", "failure", "core.settings", "core.passes",
    "core.structure_settings", "core.training_settings", "core.search_settings", "core.spec", "core.roles",
    "core.errors", "core.options", "core.artifact", "ops.widths", "ops.schedules",
)  # fmt: skip


def test_reading_recipes_and_headers_needs_no_torch():
    reached, left = set(), [f"compressor.{name}" for name in WITHOUT_TORCH]
    while left:
        module = left.pop()
        if module in reached or module not in MODULES:
            continue
        reached.add(module)
        left += imports(module, everywhere=False)
        for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = [name for name in names if name.split(".")[0] in ("torch", "transformers", "onnxruntime", "numpy")]
            assert not heavy, f"{module} imports {heavy}"
    assert "compressor.core.settings" in reached
