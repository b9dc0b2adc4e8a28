"""`budwood compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from budwood.cli.options import AsJson
from budwood.cli.streams import echo, echo_json, one_line


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of two or more runs.")],
    plot: Annotated[Path, typer.Option("--plot", help="The picture of the curves (PNG).")] = Path("compare.png"),
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="Metric drawn below the loss. Default: the one that selects the best adapter."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: metrics, curves in one plot, differing fields of the recipes, versions. Loads no model."""
    from budwood.errors import InputError
    from budwood.training.compare import compare_runs, draw

    if plot.suffix.lower() != ".png":
        raise InputError(f"--plot {plot}: name a file that ends with .png.")
    if not plot.absolute().parent.is_dir():
        raise InputError(f"--plot {plot}: its folder does not exist.")
    result = compare_runs(runs)
    draw(result, plot, metric)
    if as_json:
        echo_json({**result.as_dict(), "plot": str(plot)})
        return
    facts: list[tuple[str, list[Any]]] = [
        ("finished", ["yes" if run.manifest.get("finished") else "no" for run in result.runs]),
        ("step", [f"{run.manifest.get('step', '?')} of {run.manifest.get('steps', '?')}" for run in result.runs]),
    ]
    echo("\n".join(_table("", result.names, [*facts, *result.after])))
    if result.winner:
        echo(f"best by {result.best} ({'higher' if result.higher else 'lower'} is better): {one_line(result.winner)}")
    different_data = any(name == "data.eval" for name, _ in result.versions)
    if different_data:
        echo("note: the runs were evaluated on different data, so their metrics are not comparable")
    before = [row for row in result.before if row[0].startswith("eval_")]
    for title, rows, none in (
        ("before training", before, ""),
        ("recipe", result.recipe, "the recipes do not differ"),
        ("versions", result.versions, "versions, machine and data do not differ"),
    ):
        if rows or none:
            echo("\n" + ("\n".join(_table(title, result.names, rows)) if rows else none))
    echo(f"\ncurves: {plot}")


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]]) -> list[str]:
    cells = [[title, *names], *[[name, *map(_text, values)] for name, values in rows]]
    cells = [[one_line(cell) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        texts = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *texts]))
    return lines


def _text(value: Any) -> str:
    """Return a cell: of a long text its end, by which paths differ, or of a hash its beginning."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.01 and value % 1 else f"{value:.4g}"
    text = str(value)
    if len(text) == 64 and " " not in text and "/" not in text:
        return text[:12]
    return text if len(text) <= 40 else "…" + text[-39:]
