"""Pictures of a report: where bars, dots, marks and texts lie. templates/charts.html draws them as inline SVG.

Colours are CSS classes, so that the page decides on light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH = 760
ROW = 22
LABEL = 190
VALUE = 96
HEIGHT = 260
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 84, 20, 14, 46
N_COLOURS = 8

Legend = Sequence[tuple[str, str]]
"""(class of the colour, what it stands for), in a line."""


@dataclass(frozen=True)
class Bar:
    """One row: a pale bar of `before` behind, and parts (value, class, what it is) in front."""

    label: str
    parts: tuple[tuple[float, str, str], ...]
    before: float = 0.0
    note: str = ""

    @property
    def total(self) -> float:
        return sum(value for value, _, _ in self.parts)


@dataclass(frozen=True)
class PlacedPart:
    """A rectangle of a row; the pale one behind the others has no title."""

    kind: str
    x: float
    width: float
    title: str = ""


@dataclass(frozen=True)
class PlacedBar:
    """A row, its upper edge at `y`, what is written left of it and right of it."""

    y: int
    label: str
    parts: tuple[PlacedPart, ...]
    note: str


@dataclass(frozen=True)
class BarPlot:
    """Rows below one another; labels end at `label_x`."""

    height: int
    rows: tuple[PlacedBar, ...]
    width: int = WIDTH
    label_x: int = LABEL - 8


def bars(rows: Sequence[Bar]) -> BarPlot:
    """Horizontal bars on one scale, with a note at the right of each."""
    largest = max((max(row.total, row.before) for row in rows), default=0) or 1
    scale = (WIDTH - LABEL - VALUE) / largest
    placed = []
    for i, row in enumerate(rows):
        x, parts = float(LABEL), []
        if row.before:
            parts.append(PlacedPart("before", x, max(row.before * scale, 1)))
        for value, kind, what in row.parts:
            if value > 0:
                width = max(value * scale, 1)
                parts.append(PlacedPart(kind, x, width, what))
                x += width
        placed.append(PlacedBar(i * ROW, shortened(row.label, 24), tuple(parts), row.note))
    return BarPlot(len(rows) * ROW + 4, tuple(placed))


@dataclass(frozen=True)
class Point:
    """A dot at (x, y); `label` is written beside it, `title` is shown when the pointer is on it."""

    x: float
    y: float
    kind: str = "c0"
    label: str = ""
    title: str = ""


@dataclass(frozen=True)
class Axis:
    """What is along an axis, and how its values are written."""

    title: str
    write: Callable[[float], str]
    logarithmic: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Mark:
    """A text at a place along an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class PlacedDot:
    """A dot, and its label, which begins (`side` "beside") or ends ("label") at `label_x`."""

    x: float
    y: float
    kind: str
    title: str
    label: str
    side: str
    label_x: float


@dataclass(frozen=True)
class DotPlot:
    """A scatter plot within (left, top) to (right, bottom)."""

    x_title: str
    y_title: str
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    dots: tuple[PlacedDot, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = MARGIN_LEFT
    right: int = WIDTH - MARGIN_RIGHT
    top: int = MARGIN_TOP
    bottom: int = HEIGHT - MARGIN_BOTTOM


def dots(points: Sequence[Point], x: Axis, y: Axis, x_ticks: Sequence[tuple[float, str]] = ()) -> DotPlot:
    """A scatter plot; `x_ticks` replaces round numbers along x."""
    place_x, found_x = _scale([p.x for p in points], x, MARGIN_LEFT, WIDTH - MARGIN_RIGHT)
    place_y, found_y = _scale([p.y for p in points], y, HEIGHT - MARGIN_BOTTOM, MARGIN_TOP)
    ticks = x_ticks or [(value, x.write(value)) for value in found_x]
    return DotPlot(
        x.title,
        y.title,
        tuple(Mark(place_x(value), text) for value, text in ticks),
        tuple(Mark(place_y(value), y.write(value)) for value in found_y),
        tuple(_placed(point, place_x(point.x), place_y(point.y)) for point in points),
    )


def _placed(point: Point, x: float, y: float) -> PlacedDot:
    side, shift = ("label", -11) if x > WIDTH * 0.7 else ("beside", 11)
    return PlacedDot(
        x, y, point.kind, point.title or point.label, shortened(point.label, 40), side, x + shift
    )  # fmt: skip


def colour(index: int) -> str:
    """The class of the colour of a kind of thing; the last is for all the others."""
    return f"c{min(index, N_COLOURS - 1)}"


def _scale(
    values: Sequence[float], axis: Axis, start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:  # fmt: skip
    """Value to place, and where marks go, with some air at both ends."""
    low, high = min(values), max(values)
    if axis.logarithmic:
        low, high = math.log10(low), math.log10(high)
    if axis.zero:
        low = 0.0
    air = (high - low) * 0.06 or 0.5 * abs(high) or 0.5
    low, high = low - (0 if axis.zero else air), high + air

    def place(value: float) -> float:
        share = ((math.log10(value) if axis.logarithmic else value) - low) / (high - low)
        return start + share * (end - start)

    return place, _powers(low, high) if axis.logarithmic else _round_numbers(low, high)


def _round_numbers(low: float, high: float) -> list[float]:
    """About five round numbers of a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten."""
    all_of = (factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5))
    return [value for value in all_of if low <= math.log10(value) <= high]


def shortened(text: str, n: int) -> str:
    """The end of a text, which is what names differ in."""
    return text if len(text) <= n else "…" + text[-n + 1 :]
