"""Compares runs by the files in their folders: metrics, curves, differing recipe fields and versions."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

from budwood.errors import InputError, did_you_mean
from budwood.training.records import flat
from budwood.training.runs import RunFiles, read_run, running_mean
from budwood.untrusted.files import complete_file

TABLE = tuple[str, list[Any]]
"""A row: its name, and one value a run; None where a run has none."""


@dataclass
class Comparison:
    """Runs side by side.

    Attributes:
        names: short names of the runs, unique.
        before, after: metrics before training, and of the written adapter, in the order in which they first occur.
        best: the metric that selects the best adapter, if all runs have the same; `higher`: its direction.
        recipe: fields of the recipes that differ, output folders left out.
        versions: versions of libraries, machine and data that differ.
    """

    runs: list[RunFiles]
    names: list[str]
    before: list[TABLE]
    after: list[TABLE]
    best: str
    higher: bool
    recipe: list[TABLE]
    versions: list[TABLE]

    @property
    def winner(self) -> str:
        """Name of the run with the best `best`; "" if runs differ in what they select by, in data, or have none."""
        values = dict(self.after).get(self.best) or []
        known = [(value, name) for value, name in zip(values, self.names, strict=False) if value is not None]
        different_data = any(name == "data.eval" for name, _ in self.versions)
        if len(known) < 2 or different_data:
            return ""
        return (max if self.higher else min)(known)[1]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values, one entry a run where values are listed."""
        runs = [
            {
                "name": name,
                "folder": str(run.directory),
                "finished": bool(run.manifest.get("finished")),
                "step": run.manifest.get("step"),
                "steps": run.manifest.get("steps"),
                "seconds": run.manifest.get("seconds"),
                "before": run.manifest.get("before") or {},
                "metrics": run.manifest.get("metrics") or {},
            }
            for name, run in zip(self.names, self.runs, strict=True)
        ]
        best = {"metric": self.best or None, "higher": self.higher, "run": self.winner or None}
        return {"runs": runs, "best": best, "recipe": dict(self.recipe), "versions": dict(self.versions)}


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read runs and compare them.

    Raises:
        InputError: fewer than two folders, one twice, or one that is not a run's.
        CorruptError: a manifest is damaged.
    """
    if len(folders) < 2:
        raise InputError("give the folders of two or more runs, as in `budwood compare runs/a runs/b`.")
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise InputError(f"{folder} is given twice.")
    runs = [read_run(folder) for folder in folders]
    bests = {run.best for run in runs}
    best, higher = bests.pop() if len(bests) == 1 else ("", False)
    return Comparison(
        runs, _short(resolved), _rows([run.manifest.get("before") or {} for run in runs]),
        _rows([run.manifest.get("metrics") or {} for run in runs]), best, higher,
        _recipe_rows(runs), _different(_rows([_setting(run) for run in runs])),
    )  # fmt: skip


def draw(comparison: Comparison, picture: Path, metric: str | None = None) -> None:
    """Draw the curves of all runs: the running mean of the training loss, and a metric of the evaluations.

    Args:
        metric: a metric of steps or evaluations; by default the best metric, or the evaluation loss.

    Raises:
        InputError: no run has the metric.
        ResourceError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = list(dict.fromkeys(name for run in comparison.runs for name in run.curves))
    if metric is not None and metric not in known:
        raise InputError(
            f"--metric {metric}: no run has it.{did_you_mean(metric, known)} They have {', '.join(known)}."
        )
    lower = metric or (comparison.best if comparison.best in known else "eval_loss")
    panels = [name for name in dict.fromkeys(("loss", lower)) if name in known]
    if not panels:
        raise InputError("no run has a step or an evaluation to draw.")
    figure = Figure(figsize=(8, 3.5 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for label, run in zip(comparison.names, comparison.runs, strict=True):
            points = run.curve(name)
            evaluated = name.startswith("eval_")
            if points:
                x, y = zip(*(points if evaluated else running_mean(points)), strict=True)
                label = " " + label if label.startswith("_") else label  # matplotlib hides such labels
                axes.plot(x, y, label=label.replace("$", r"\$"), marker="o" if evaluated else None, linewidth=1.6)
        axes.set_ylabel(name.removeprefix("eval_").replace("_", " ") + (" of evaluations" if evaluated else ""))
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    complete_file(picture, drawn.getvalue())


def _setting(run: RunFiles) -> dict[str, Any]:
    manifest = run.manifest
    names = ("budwood", "python", "versions", "device", "precision", "processes")
    setting = {name: manifest.get(name) for name in names}
    setting["strategies"] = {s["name"]: s["distribution"] for s in manifest.get("strategies") or ()}
    setting["base"] = {"fingerprint": (manifest.get("base") or {}).get("fingerprint")}
    data = manifest.get("data") or {}
    held_out = data.get("held_out")
    setting["data"] = {
        "train": data.get("train"),
        "eval": data.get("eval") if not held_out else hashlib.sha256(json.dumps(held_out).encode()).hexdigest(),
    }
    return {name.removeprefix("versions."): value for name, value in flat(setting).items()}


def _recipe_rows(runs: Sequence[RunFiles]) -> list[TABLE]:
    """Return the fields that differ; a strategy that only some runs have counts as one field, and so do its options."""
    strategies = [set(_names(run.recipe)) for run in runs]
    everywhere = set.intersection(*strategies)
    result: list[TABLE] = []
    for name in dict.fromkeys(name for run in runs for name in _names(run.recipe)):
        if name not in everywhere:
            result.append((name, ["yes" if name in some else None for some in strategies]))
    for name, values in _rows([flat(_named(run.recipe)) for run in runs]):
        owner = name.partition(".")[0]
        given = [
            value
            for value, some in zip(values, strategies, strict=True)
            if owner in some or owner not in set.union(*strategies)
        ]
        if name != "output" and any(value != given[0] for value in given):
            result.append((name, values))
    return result


def _names(recipe: dict[str, Any]) -> list[str]:
    return [item if isinstance(item, str) else next(iter(item)) for item in recipe.get("strategies") or ()]


def _named(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe in which the strategies are a mapping by name, so that their options are compared one by one."""
    given = {name: value for name, value in recipe.items() if name != "strategies"}
    for item in recipe.get("strategies") or ():
        given |= {
            name: options or "defaults" for name, options in ({item: {}} if isinstance(item, str) else item).items()
        }
    return given


def _rows(values: Sequence[dict[str, Any]]) -> list[TABLE]:
    names = dict.fromkeys(name for each in values for name in each)
    return [(name, [each.get(name) for each in values]) for name in names]


def _different(rows: Sequence[TABLE]) -> list[TABLE]:
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _short(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names without what they have in common at the start."""
    common = Path(commonpath(folders))
    names = [str(folder.relative_to(common)) for folder in folders]
    return [folder.name if name == "." else name for name, folder in zip(names, folders, strict=True)]
