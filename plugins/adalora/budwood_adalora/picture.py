"""Draws ranks.png: the rank of every adapted module, and the budget over time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_IN_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_ANNOTATED = 40
"""Up to this many layers, cells show their rank as a number."""


def draw_ranks(ranks: Mapping[str, int], budgets: Sequence[int], target: int, largest: int, picture: Path) -> None:
    """Draw ranks.png.

    Args:
        ranks: final rank of each module, by its path; for experts their mean.
        budgets: allowed sum of the ranks after each step, from step 0.
        target: final budget.
        largest: the initial rank, the upper end of the colour scale.
        picture: path of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, columns, grid = _grid(ranks)
    width = min(max(5.5, 2.8 + 0.36 * len(columns)), 18)
    heights = [max(1.6, 0.34 * len(rows) + 0.5), 1.7]
    figure = Figure(figsize=(width, sum(heights) + 0.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    top.set_facecolor("#eeeeee")
    image = top.imshow(grid, cmap="Blues", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    top.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    top.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    top.grid(which="minor", color="white", linewidth=1.5)
    top.tick_params(which="both", length=0, labelsize=8)
    top.spines[:].set_visible(False)
    every = 1 + len(columns) // _ANNOTATED
    top.set_xticks(range(0, len(columns), every), columns[::every])
    top.set_yticks(range(len(rows)), rows)
    top.set_xlabel("layer", fontsize=9)
    spread = (
        f"{min(ranks.values())} to {max(ranks.values())}"
        if len(set(ranks.values())) > 1
        else f"all {min(ranks.values())}"
    )
    top.set_title(f"rank of each module: {spread}, mean {np.mean(list(ranks.values())):.1f}", fontsize=10, loc="left")
    if len(columns) <= _ANNOTATED:
        for (row, column), rank in np.ndenumerate(grid):
            if not np.ma.is_masked(rank):
                shade = "white" if rank > 0.6 * largest else "#333333"
                top.text(column, row, int(rank), ha="center", va="center", fontsize=7, color=shade)
    bar = figure.colorbar(image, ax=top, pad=0.02, aspect=12)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]

    bottom.axhline(target, color="#d94801", linewidth=1, linestyle="--", zorder=3, label=f"target {target}")
    bottom.step(range(len(budgets)), budgets, where="post", color="#2171b5", linewidth=2, label="budget")
    bottom.set_ylim(0, 1.08 * max(budgets))
    bottom.set_xlim(0, max(len(budgets) - 1, 1))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("optimizer step", fontsize=9)
    bottom.set_ylabel("sum of ranks", fontsize=9)
    bottom.tick_params(labelsize=8)
    bottom.spines[["top", "right"]].set_visible(False)
    bottom.grid(alpha=0.3)
    bottom.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(picture)


def _grid(ranks: Mapping[str, int]) -> tuple[list[str], list[str], np.ma.MaskedArray]:
    """Return the names of rows (modules) and columns (layers), and the ranks [rows, columns], masked if missing."""
    places: dict[str, tuple[tuple[str, str], int | None]] = {}
    for path in ranks:
        match = _IN_LAYER.match(path)
        places[path] = ((match[1], match[3]), int(match[2])) if match else (("", path), None)
    modules = list(dict.fromkeys(module for module, _ in places.values()))
    names = [name for _, name in modules]
    rows = [name if names.count(name) == 1 else f"{stack}: {name}" for stack, name in modules]
    layers = sorted({layer for _, layer in places.values() if layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(layer is None for _, layer in places.values()) else [])]
    grid = np.ma.masked_all((len(modules), len(columns)))
    for path, (module, layer) in places.items():
        grid[modules.index(module), columns.index(layer)] = ranks[path]
    return rows, ["none" if layer is None else str(layer) for layer in columns], grid
