"""One direction of imports, read from the sources: whoever reads a module need not know who uses it."""

from __future__ import annotations

import graphlib
import re

import pytest

from scripts.draw_house import ROOMS, RULE, imports_of, modules, room_of

MODULES = modules()


def test_every_folder_has_its_place_in_the_rule():
    assert {room_of(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_lower_rooms_only(room):
    allowed = {room, *(name for row in RULE[ROOMS[room] + 1 :] for name in row)}
    # Of one row, one way is allowed as well; that there is no way back is held below.
    allowed |= set(RULE[ROOMS[room]])
    for name in (name for name in MODULES if room_of(name) == room):
        above = sorted(other for other in imports_of(name) if room_of(other) not in allowed)
        assert not above, f"{name} imports {above}"


def test_no_circles_between_modules():
    """In one room or several, within functions and for type checkers too."""
    graphlib.TopologicalSorter({name: imports_of(name) for name in MODULES}).prepare()


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) == "ops"])
def test_ops_know_nothing_else(module):
    assert {room_of(name) for name in imports_of(module)} <= {"ops"}


PAPERS = [name for name in MODULES if name.startswith("passes.") and name.count(".") == 1 and name != "passes.registry"]


@pytest.mark.parametrize("module", PAPERS)
def test_a_pass_stands_on_core_ops_its_settings_and_shared_parts(module):
    own = f"passes.settings.{module.removeprefix('passes.')}"
    for name in imports_of(module):
        shared = name.startswith("passes.parts.") or name == "passes.settings.fields"
        assert room_of(name) in ("core", "ops") or name == own or shared, f"{module} imports {name}"


# A command that only reads a recipe or a header must start in a moment.
WITHOUT_TORCH = (
    "cli.commands", "cli.exit_status", "plan.recipe", "plan.recipe_file", "plan.planning", "evaluate.inspection",
    "core.progress", "core.passes", "core.training", "core.spec", "core.roles", "core.errors", "core.options",
    "core.artifact", "core.report", "passes.registry", "ops.widths", "ops.schedules", "run.prepare",
)  # fmt: skip


def test_reading_recipes_and_headers_needs_no_torch():
    reached, left = set(), list(WITHOUT_TORCH)
    while left:
        module = left.pop()
        if module in reached:
            continue
        reached.add(module)
        left += imports_of(module, at_import=True)
        heavy = sorted(MODULES[module].libraries & {"torch", "transformers", "onnxruntime", "numpy"})
        assert not heavy, f"{module} imports {heavy}"
    assert "passes.settings.affine" in reached


def test_one_module_asks_the_system_for_memory_and_processor():
    asking = {
        name for name in MODULES if re.search(r"\bpsutil\b|/proc/", MODULES[name].path.read_text(encoding="utf-8"))
    }
    assert asking == {"core.machine"}
