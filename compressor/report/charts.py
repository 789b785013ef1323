"""Pictures as inline SVG. Colours are CSS classes, so that the page decides on light or dark; texts are escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
ROW = 22
LABEL = 190
VALUE = 96
HEIGHT = 260
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 84, 20, 14, 46
N_COLOURS = 8


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


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars on one scale, with a note at the right of each."""
    largest = max((max(row.total, row.before) for row in rows), default=0) or 1
    scale = (WIDTH - LABEL - VALUE) / largest
    drawn = []
    for i, row in enumerate(rows):
        y, x = i * ROW, float(LABEL)
        drawn.append(f'<text class="label" x="{LABEL - 8}" y="{y + 15}">{escape(shortened(row.label, 24))}</text>')
        if row.before:
            width = max(row.before * scale, 1)
            drawn.append(f'<rect class="before" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="14" rx="2"/>')
        for value, kind, what in row.parts:
            if value <= 0:
                continue
            width = max(value * scale, 1)
            drawn.append(
                f'<rect class="{escape(kind)}" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="14">'
                f"<title>{escape(what)}</title></rect>"
            )
            x += width
        drawn.append(f'<text class="note" x="{WIDTH}" y="{y + 15}">{escape(row.note)}</text>')
    return _svg(len(rows) * ROW + 4, drawn, "bars")


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


def dots(points: Sequence[Point], x: Axis, y: Axis, x_ticks: Sequence[tuple[float, str]] = ()) -> str:
    """A scatter plot; `x_ticks` replaces round numbers along x."""
    place_x, found_x = _scale([p.x for p in points], x, MARGIN_LEFT, WIDTH - MARGIN_RIGHT)
    place_y, found_y = _scale([p.y for p in points], y, HEIGHT - MARGIN_BOTTOM, MARGIN_TOP)
    drawn = []
    for value in found_y:
        at = place_y(value)
        drawn.append(f'<line class="grid" x1="{MARGIN_LEFT}" x2="{WIDTH - MARGIN_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text class="label" x="{MARGIN_LEFT - 8}" y="{at + 4:.1f}">{escape(y.write(value))}</text>')
    for value, text in x_ticks or [(value, x.write(value)) for value in found_x]:
        drawn.append(
            f'<text class="middle" x="{place_x(value):.1f}" y="{HEIGHT - MARGIN_BOTTOM + 18}">{escape(text)}</text>'
        )
    middle = (MARGIN_LEFT + WIDTH - MARGIN_RIGHT) / 2
    drawn.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}">{escape(x.title)}</text>')
    across = (HEIGHT - MARGIN_BOTTOM + MARGIN_TOP) / 2
    drawn.append(f'<text class="axis" transform="translate(13 {across}) rotate(-90)">{escape(y.title)}</text>')
    for point in points:
        at_x, at_y = place_x(point.x), place_y(point.y)
        drawn.append(
            f'<circle class="{escape(point.kind)}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="{6 if point.label else 4}">'
            f"<title>{escape(point.title or point.label)}</title></circle>"
        )
        if point.label:
            right = at_x > WIDTH * 0.7
            side, shift = ("label", -11) if right else ("beside", 11)
            text = escape(shortened(point.label, 40))
            drawn.append(f'<text class="{side}" x="{at_x + shift:.1f}" y="{at_y + 4:.1f}">{text}</text>')
    return _svg(HEIGHT, drawn, "dots")


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(class, what it stands for), in a line."""
    spans = [f'<span><svg width="12" height="12"><rect class="{escape(kind)}" width="12" height="12" rx="2"/></svg> '
             f"{escape(text)}</span>" for kind, text in entries]  # fmt: skip
    return f'<p class="legend">{"".join(spans)}</p>'


def colour(index: int) -> str:
    """The class of the colour of a kind of thing; the last is for all the others."""
    return f"c{min(index, N_COLOURS - 1)}"


def _svg(height: int, drawn: Sequence[str], kind: str) -> str:
    picture = f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg>'
    return f'<div class="scroll">{picture}</div>'


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
