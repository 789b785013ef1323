"""Networks that were measured, as a picture: the share of the original's time across, what they lose upwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 70, 20, 40, 50
STYLE = (
    "svg{--page:#fff;--ink:#222;--soft:#767676;--dot:#9bb4c9;--front:#1b6ca8;--chosen:#c44e52}"
    "@media(prefers-color-scheme:dark){svg{--page:#16191c;--ink:#e8eaec;--soft:#9aa3aa;--dot:#51687c;--front:#6aa9e9;"
    "--chosen:#f08a8d}}text{font:11px sans-serif;fill:var(--ink)}.page{fill:var(--page)}"
    ".axis{stroke:var(--soft)}.target{stroke:var(--chosen);stroke-dasharray:4 3}"
    ".other{fill:var(--dot)}.front{fill:var(--front)}.chosen{fill:var(--chosen)}"
)


def front_picture(points: Sequence[tuple[float, float, str]], target: float) -> str:
    """SVG of (share of the original's time, loss, "other", "front" or "chosen"), with a line at the `target` share."""
    right = 1.05 * max(target, *(share for share, _, _ in points))
    top = 1.05 * max(loss for _, loss, _ in points) or 1.0

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * share / right

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * max(0.0, loss) / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{len(points)} networks: time and loss</title><style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
        f'<path class="target" d="M{x(target):.1f} {TOP}V{HEIGHT - BOTTOM}"/>',
        f'<text x="{x(target) + 4:.1f}" y="{TOP - 6}" text-anchor="middle">target {target:.0%}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">share of the original\'s time</text>',
        f'<text x="{LEFT}" y="{TOP - 22}">what is lost; {len(points)} networks were measured</text>',
    ]
    for share in _ticks(right):
        parts.append(f'<text x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{share:.0%}</text>')
    for loss in _ticks(top):
        parts.append(f'<text x="{LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    for share, loss, kind in sorted(points, key=lambda point: ("other", "front", "chosen").index(point[2])):
        size = 5 if kind == "chosen" else 3.5
        parts.append(
            f'<circle class="{kind}" cx="{x(share):.1f}" cy="{y(loss):.1f}" r="{size}"><title>{share:.1%}, '
            f"{loss:.4g}</title></circle>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 on, five or so."""
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= largest / 5)
    return [round(i * step, 12) for i in range(int(largest / step) + 1)]
