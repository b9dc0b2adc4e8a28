"""What a sweep leaves: a table, Optuna's plots, and the best recipe."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from budwood.errors import describe, plural
from budwood.recipe.file import dump, read_recipe_file
from budwood.sweeps.search import best_trial
from budwood.sweeps.space import Field
from budwood.sweeps.study import values_of
from budwood.untrusted.files import complete_file

TABLE, BEST = "trials.csv", "best.yaml"
PARALLEL, IMPORTANCE = "parallel.png", "importance.png"
PLOTTED = 3
"""Fewest complete trials that are plotted."""


def rows(study: Any, fields: Sequence[Field], higher: bool) -> list[dict[str, Any]]:
    """Return one row a trial, the best first, then those without a value."""
    from optuna.trial import TrialState

    found = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        attributes = trial.user_attrs
        running = trial.state == TrialState.RUNNING
        found.append(
            {
                "trial": trial.number,
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                **(values_of(trial.params, fields) if len(trial.params) == len(fields) else {}),
                "outcome": attributes.get("outcome") or ("running" if running else "failed"),
                "seconds": attributes.get("seconds"),
                "folder": attributes.get("folder"),
                "error": attributes.get("error", ""),
            }
        )
    sign = -1 if higher else 1
    return sorted(found, key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0), row["trial"]))


def write_results(
    study: Any, fields: Sequence[Field], metric: str, higher: bool, directory: Path, say: Callable[[str], None]
) -> None:
    """Write the table, the best recipe and the plots to the sweep's folder."""
    table = rows(study, fields, higher)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["trial", "value", *(f.key for f in fields), "outcome", "seconds", "folder", "error"])
    writer.writeheader()
    writer.writerows(table)
    complete_file(directory / TABLE, text.getvalue().encode())
    best = best_trial(study)
    if best is None:
        return
    recipe = directory / str(best.user_attrs["folder"]) / "recipe.yaml"
    if recipe.is_file():
        values = read_recipe_file(recipe)[0] | {"output": str(directory / "best")}
        head = f"# The best of {plural(len(table), 'trial')}: trial {best.number}, {metric} {best.value:.6g}.\n"
        complete_file(directory / BEST, (head + dump(values)).encode())
    else:
        say(f"note: trial {best.number}, the best, ran on another machine; {BEST} is written by the worker there")
    if sum(row["value"] is not None for row in table) >= PLOTTED:
        _plot(study, fields, metric, directory, say)


def _plot(study: Any, fields: Sequence[Field], metric: str, directory: Path, say: Callable[[str], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    names = [field.key for field in fields]
    drawn = [(PARALLEL, lambda: plots.plot_parallel_coordinate(study, params=names, target_name=metric))]
    if len(fields) > 1:
        drawn.append((IMPORTANCE, lambda: plots.plot_param_importances(study, target_name=metric)))
    for name, draw in drawn:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure: Any = draw().figure
                figure.set_size_inches(9, 5)
                image = io.BytesIO()
                figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
            complete_file(directory / name, image.getvalue())
        except Exception as error:  # a plot is not worth a sweep
            say(f"note: {name} was not drawn: {describe(error)}")
        finally:
            plt.close("all")


def table_lines(table: Sequence[dict[str, Any]], fields: Sequence[Field], metric: str) -> list[str]:
    """Return the lines of a table for the terminal."""
    cells = [["trial", metric, *(field.key for field in fields), "time", "outcome"]]
    for row in table:
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:,.0f} s"
        values = [_cell(row.get(field.key)) for field in fields]
        cells.append([str(row["trial"]), _cell(row["value"]), *values, seconds, row["outcome"]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        *numbers, outcome = line
        aligned = (text.rjust(width) for text, width in zip(numbers, widths, strict=False))
        lines.append("  ".join([*aligned, outcome]))
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else "…" + text[-29:]
