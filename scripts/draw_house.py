#!/usr/bin/env python
"""The rooms of the package and the imports between them: the rule, docs/house.svg and docs/design.md's tables from it.

scripts/draw_house.py            writes docs/house.svg, and fills docs/design.md between its marks
scripts/draw_house.py --count    prints rooms, modules, floors of imports and circles

The picture and the tables are made from RULE, from what the modules really import, and from the first sentence of
their docstrings. A test holds that both files are current.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "compressor"
PICTURE = ROOT / "docs" / "house.svg"
PAGE = ROOT / "docs" / "design.md"

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

    path: Path
    summary: str
    """The first sentence of its docstring."""
    imported: frozenset[str]
    at_import: frozenset[str]
    libraries: frozenset[str]


def room_of(module: str) -> str:
    """`cli` of `cli.commands`; "" of what lies in no folder."""
    return module.split(".")[0] if "." in module or (PACKAGE / module).is_dir() else ""


@cache
def modules(package: Path = PACKAGE) -> dict[str, Module]:
    """Every file of the package, by its name without `compressor.`; the package itself is `__init__`."""
    paths = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return {name: _read(path, set(paths)) for name, path in paths.items()}


def imports_of(module: str, at_import: bool = False) -> frozenset[str]:
    """The modules that one imports; `at_import` without those inside of functions and for type checkers."""
    found = modules()[module]
    return found.at_import if at_import else found.imported


def first_sentence(docstring: str) -> str:
    """Up to the first full stop, or as far as the first paragraph; without the stop."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<!arXiv)\.(?=\s)", paragraph)[0].removesuffix(".")


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
    summary = first_sentence(ast.get_docstring(tree) or "")
    return Module(path, summary, frozenset(ours), frozenset(first), frozenset(libraries))


def _named(node: ast.AST, known: set[str]) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name for name in inner if name.removeprefix("compressor.") in known} or {node.module}
    return set()


def members(room: str) -> list[str]:
    """The modules of a room without the room itself, as `name` or `folder.name`."""
    return [name.removeprefix(f"{room}.") for name in modules() if name.startswith(f"{room}.")]


def arrows() -> set[tuple[str, str]]:
    """(room, another that a module of it imports), the package's own face left out."""
    pairs = {(room_of(name), room_of(other)) for name in modules() for other in imports_of(name)}
    return {(a, b) for a, b in pairs if a != b and a and b}


def needed(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs but for those (a, c) that follow from others, (a, b) and (b, c)."""

    def reached(start: str, without: tuple[str, str]) -> set[str]:
        seen: set[str] = set()
        left = [b for a, b in pairs if a == start and (a, b) != without]
        while left:
            room = left.pop()
            if room not in seen:
                seen.add(room)
                left += [b for a, b in pairs if a == room and (a, b) != without]
        return seen

    return {pair for pair in pairs if pair[1] not in reached(pair[0], pair)}


def count() -> dict[str, int]:
    """How large the house is: rooms, modules, arrows between rooms, floors of imports, circles."""
    graph = {name: imports_of(name) for name in modules()}
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
    return {"rooms": len(ROOMS) - 1, "modules": len(graph), "arrows between rooms": len(arrows()), "floors": floors,
            "circles": circles}  # fmt: skip


# The picture: rooms in the rows of RULE. An arrow that skips rows passes each in a gap of its own between the rooms.

WIDTH, MARGIN = 1000, 14
GAP, LANE, BETWEEN = 14, 10, 36
"""Between neighbours in a row, where an arrow only passes, and between rows."""
PADDING, LINE, TITLE = 9, 13.5, 17
WIDEST_EMPTY, PER_MODULE = 250, 7
"""Of a room's width: what it would have without modules, and more for each, where its row has the room."""
NAME_WIDTH, TEXT_WIDTH = 6.05, 5.75
"""Of a character of a module's name and of a sentence, in pixels: a little more than most fonts take."""

STYLE = """
  svg { --page: #fbfbfa; --ink: #1d2327; --soft: #59646b; --card: #ffffff; --edge: #b9c3c9; --line: #5f86ad; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #14181b; --ink: #e6eaec; --soft: #a3adb4; --card: #1f262b; --edge: #46525a; --line: #6aa9e9; }
  }
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--soft);
    font-size: 10.5px; }
  .page { fill: var(--page); } .room { fill: var(--card); stroke: var(--edge); }
  .title { fill: var(--ink); font-size: 13px; font-weight: 600; }
  .names { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 10px;
    fill: var(--ink); }
  .arrow { fill: none; stroke: var(--line); stroke-width: 1.3; opacity: .8; } .tip { fill: var(--line); }
"""


@dataclass
class Place:
    """A room, or where an arrow passes a row: its middle along the row, its size, and what is written in it."""

    width: float
    middle: float = 0.0
    height: float = 0.0
    about: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Passing:
    """An arrow of this pair crosses a row."""

    pair: tuple[str, str]
    row: int


Key = str | Passing


def picture() -> str:
    """docs/house.svg: rooms as boxes, as large as they have modules, and the arrows that no others imply."""
    pairs = sorted(needed(arrows()))
    rows: list[list[Key]] = [list(rooms) for rooms in RULE]
    routes: dict[tuple[str, str], list[Key]] = {}
    for pair in pairs:
        passed = [Passing(pair, row) for row in range(ROOMS[pair[0]] + 1, ROOMS[pair[1]])]
        for each in passed:
            rows[each.row].append(each)
        routes[pair] = [pair[0], *passed, pair[1]]
    places: dict[Key, Place] = {}
    for row in rows:
        rooms = [key for key in row if isinstance(key, str)]
        free = WIDTH - 2 * MARGIN - GAP * (len(row) - 1) - LANE * (len(row) - len(rooms))
        widths = {room: WIDEST_EMPTY + PER_MODULE * len(members(room)) for room in rooms}
        share = min(1.0, free / sum(widths.values()))
        places |= {key: _room(key, share * widths[key]) if isinstance(key, str) else Place(LANE) for key in row}
    _arrange(rows, places, routes)
    tops, y = [], float(MARGIN + 22)
    for row in rows:
        tops.append(y)
        y += max(places[key].height for key in row) + BETWEEN
    return _svg(rows, places, routes, tops, y - BETWEEN + MARGIN)


def _room(name: str, width: float) -> Place:
    """The box of a room and what is written in it: a sentence, then the names of its modules and folders."""
    inner: dict[str, int] = {}
    for member in members(name):
        folder, _, file = member.partition(".")
        inner[folder] = inner.get(folder, 0) + bool(file)
    names = [f"{folder}/ {n}" if n else folder for folder, n in inner.items()]
    text = textwrap.wrap(_about(name), int((width - 2 * PADDING) / TEXT_WIDTH))
    rows = textwrap.wrap("  ".join(each.replace(" ", "\N{NO-BREAK SPACE}") for each in names),
                         int((width - 2 * PADDING) / NAME_WIDTH), break_on_hyphens=False)  # fmt: skip
    height = 2 * PADDING + TITLE + LINE * (len(text) + len(rows)) + 2
    return Place(width, 0.0, height, text, rows)


def _about(room: str) -> str:
    return modules()[room].summary.replace("`", "")


def _arrange(rows: list[list[Key]], places: dict[Key, Place], routes: Mapping[tuple[str, str], list[Key]]) -> None:
    """Orders each row, and moves what is in it, so that arrows run as straight as they can."""
    near: dict[Key, list[Key]] = {key: [] for key in places}
    for route in routes.values():
        for a, b in itertools.pairwise(route):
            near[a].append(b)
            near[b].append(a)
    for row in rows:
        _spread(row, places, dict.fromkeys(row, WIDTH / 2))
    for _ in range(60):
        for row in (*rows, *reversed(rows)):
            wanted = {key: _mean([places[each].middle for each in near[key]], places[key].middle) for key in row}
            row.sort(key=lambda key: (wanted[key], str(key)))
            _spread(row, places, wanted)


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(row: list[Key], places: dict[Key, Place], wanted: Mapping[Key, float]) -> None:
    """Middles as near to the wanted ones as order, widths and the page's edges allow: neighbours that overlap are
    joined to one block, which then lies where all of its parts want it on average."""
    blocks: list[tuple[list[Key], float]] = []

    def width(keys: list[Key]) -> float:
        return sum(places[key].width for key in keys) + GAP * (len(keys) - 1)

    def left(keys: list[Key]) -> float:
        starts, at = [], 0.0
        for key in keys:
            starts.append(wanted[key] - at - places[key].width / 2)
            at += places[key].width + GAP
        return min(max(sum(starts) / len(starts), MARGIN), WIDTH - MARGIN - width(keys))

    for key in row:
        keys, start = [key], left([key])
        while blocks and blocks[-1][1] + width(blocks[-1][0]) + GAP > start:
            keys = blocks.pop()[0] + keys
            start = left(keys)
        blocks.append((keys, start))
    for keys, at in blocks:
        for key in keys:
            places[key].middle = at + places[key].width / 2
            at += places[key].width + GAP


def _svg(
    rows: list[list[Key]], places: dict[Key, Place], routes: Mapping[tuple[str, str], list[Key]], tops: list[float],
    height: float,
) -> str:  # fmt: skip
    drawn = [f'<rect class="page" width="{WIDTH}" height="{height:.0f}"/>']
    words = "An arrow: imports. What follows from two arrows is not drawn, and every room may import core and ops."
    drawn.append(f'<text x="{MARGIN}" y="{MARGIN + 5}">{words}</text>')
    row_of = {key: number for number, row in enumerate(rows) for key in row}
    ends = _ends(places, routes)
    for pair, route in routes.items():
        drawn += _arrow(pair, route, places, row_of, tops, ends)
    for number, row in enumerate(rows):
        for key in row:
            if isinstance(key, str):
                drawn += _box(key, places[key], tops[number])
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img">\n<title>The rooms of compressor and what imports what</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _box(name: str, place: Place, top: float) -> list[str]:
    x, n = place.middle - place.width / 2, len(members(name))
    y = top + PADDING + 11
    drawn = [f'<rect class="room" x="{x:.1f}" y="{top:.1f}" width="{place.width:.1f}" height="{place.height:.1f}" '
             'rx="6"/>', f'<text class="title" x="{x + PADDING:.1f}" y="{y:.1f}">{name}</text>',
             f'<text x="{x + place.width - PADDING:.1f}" y="{y:.1f}" text-anchor="end">{n} modules</text>']  # fmt: skip
    y += TITLE - 1
    for i, line in enumerate((*place.about, *place.names)):
        kind, extra = ("", 0) if i < len(place.about) else (' class="names"', 3)
        drawn.append(f'<text{kind} x="{x + PADDING:.1f}" y="{y + extra + LINE * i:.1f}">{escape(line)}</text>')
    return drawn


def _ends(
    places: dict[Key, Place], routes: Mapping[tuple[str, str], list[Key]]
) -> dict[tuple[tuple[str, str], bool], float]:
    """Where along a room's lower (True) or upper edge an arrow ends: side by side, in the order of where they go."""
    found: dict[tuple[tuple[str, str], bool], float] = {}
    for lower in (True, False):
        by_room: dict[str, list[tuple[float, tuple[str, str]]]] = {}
        for pair, route in routes.items():
            if ROOMS[pair[0]] != ROOMS[pair[1]]:
                beyond = places[route[1] if lower else route[-2]].middle
                by_room.setdefault(pair[0] if lower else pair[1], []).append((beyond, pair))
        for room, targets in by_room.items():
            place = places[room]
            half = place.width / 2 - 14
            spread = min(26.0, 2 * half / max(1, len(targets) - 1))
            at = place.middle - spread * (len(targets) - 1) / 2
            wished = sum(beyond for beyond, _ in targets) / len(targets)  # shifted towards where the arrows go
            room_left = half - spread * (len(targets) - 1) / 2
            at += max(-room_left, min(room_left, wished - place.middle))
            for i, (_, pair) in enumerate(sorted(targets)):
                found[pair, lower] = at + spread * i
    return found


def _arrow(
    pair: tuple[str, str], route: list[Key], places: dict[Key, Place], row_of: Mapping[Key, int], tops: list[float],
    ends: Mapping[tuple[tuple[str, str], bool], float],
) -> list[str]:  # fmt: skip
    """A smooth line from the lower edge of a room, straight through each row that it passes, to the next room."""
    first, last = places[pair[0]], places[pair[1]]
    title = f"<title>{pair[0]} imports {pair[1]}</title>"
    if ROOMS[pair[0]] == ROOMS[pair[1]]:
        right = first.middle < last.middle
        start = first.middle + (first.width / 2) * (1 if right else -1)
        end = last.middle + (last.width / 2) * (-1 if right else 1)
        y = tops[row_of[pair[0]]] + (24 if right else 34)
        tip = end - 7 if right else end + 7
        return [
            f'<path class="arrow" d="M{start:.1f} {y:.1f}H{tip:.1f}">{title}</path>',
            _tip(end, y, 1 if right else -1),
        ]
    x, y = ends[pair, True], tops[row_of[pair[0]]] + first.height
    path = f"M{x:.1f} {y:.1f}"
    for key in route[1:]:
        to = ends[pair, False] if key == route[-1] else places[key].middle
        below = tops[row_of[key]] - (6 if key == route[-1] else 0)
        begin = tops[row_of[key]] - BETWEEN  # from the end of the row above, whose rooms differ in height
        half = (begin + below) / 2
        path += f"V{begin:.1f}C{x:.1f} {half:.1f} {to:.1f} {half:.1f} {to:.1f} {below:.1f}"
        x = to
    end = tops[row_of[pair[1]]]
    return [f'<path class="arrow" d="{path}">{title}</path>', _tip(x, end)]


def _tip(x: float, y: float, sideways: int = 0) -> str:
    """An arrow's head at a point, pointing down, or to the right (1) or the left (−1)."""
    if sideways:
        back = x - 8 * sideways
        return f'<path class="tip" d="M{x:.1f} {y:.1f}L{back:.1f} {y - 4:.1f}V{y + 4:.1f}Z"/>'
    return f'<path class="tip" d="M{x:.1f} {y:.1f}L{x - 4:.1f} {y - 8:.1f}H{x + 4:.1f}Z"/>'


# The tables of docs/design.md, between `<!-- house: NAME -->` and `<!-- end -->`.

MARK = re.compile(r"(<!-- house: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rule_table() -> str:
    """The rule as text: a row of rooms under another may be imported by it."""
    lines = ["| row | rooms | what they are for |", "| --: | :-- | :-- |"]
    for number, rooms in enumerate(RULE, 1):
        for i, room in enumerate(rooms):
            lines.append(f"| {'' if i else number} | [`{room}/`](#{room}) | {_about(room)} |")
    return "\n".join(lines)


def module_tables() -> str:
    """A table per room: a line on every module, the first sentence of its docstring."""
    parts = []
    for room in (room for rooms in RULE for room in rooms):
        named = {f"{room}.{member}": member.replace(".", "/") for member in members(room)}
        rows = [f"| `{short}` | {_cell(modules()[name].summary)} |" for name, short in named.items()]
        parts.append("\n".join([f"### {room}", "", f"{_about(room)}.", "", "| module | |", "| :-- | :-- |", *rows]))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


TABLES: dict[str, Callable[[], str]] = {"rule": rule_table, "modules": module_tables}


def filled(page: str) -> str:
    """The text of docs/design.md with its tables as they should be."""
    return MARK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true")
    arguments = parser.parse_args()
    if arguments.count:
        print("\n".join(f"{name}: {number}" for name, number in count().items()))
    else:
        PICTURE.write_text(picture(), encoding="utf-8")
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
