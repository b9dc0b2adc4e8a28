"""Line charts as inline SVG, whose colours come from the page's style. Imports no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from budwood.training.runs import Points

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 26
MOST = 300
"""Points of a line; more are averaged in groups."""


def chart(title: str, lines: Sequence[tuple[str, Points]], marks: bool = False) -> str:
    """Return a figure with lines over optimizer steps, and a legend if there are several; "" without points.

    Args:
        lines: pairs of a name and its points; those that are not finite are left out.
        marks: draw a circle at each point.
    """
    drawn = [(name, [(x, y) for x, y in points if math.isfinite(y)]) for name, points in lines]
    drawn = [(name, _averaged(points)) for name, points in drawn if points]
    if not drawn:
        return ""
    xs, ys = zip(*(point for _, points in drawn for point in points), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(min(ys), max(ys))
    (x0, x1), (y0, y1) = (min(xs), max(max(xs), min(xs) + 1)), (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for y in y_ticks:
        _, at = place(x0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{y:.4g}</text>')
    for x in x_ticks:
        at, _ = place(x, y0)
        parts.append(f'<text x="{at}" y="{HEIGHT - 6}" text-anchor="middle">{x:g}</text>')
    first = 0 if len(drawn) > 1 else 1  # classes of lines: 0 is the pale one
    for number, (_, points) in enumerate(drawn, first):
        placed = [place(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline class="line c{number}" points="{path}"/>')
        if marks or len(points) == 1:
            parts += [f'<circle class="dot c{number}" cx="{x}" cy="{y}" r="3"/>' for x, y in placed]
    legend = ""
    if len(drawn) > 1:
        keys = (f'<span><i class="key k{n}"></i>{escape(name)}</span>' for n, (name, _) in enumerate(drawn))
        legend = f'<div class="legend">{"".join(keys)}</div>'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{svg}</figure>"


def ticks(low: float, high: float, whole: bool = False, count: int = 5) -> list[float]:
    """Return round values, about `count`, from at or below `low` to at or above `high`; within them if `whole`."""
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if not whole else (low, low + 1)
        if high <= low:  # a value so large that 0.5 is rounding
            low, high = low * (1 - 1e-9), high * (1 + 1e-9)
            low, high = min(low, high), max(low, high)
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    if whole:
        step = max(round(step), 1)
        return [float(value) for value in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [value * step for value in range(first, last + 1)]


def _averaged(points: Points) -> Points:
    size = math.ceil(len(points) / MOST)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
