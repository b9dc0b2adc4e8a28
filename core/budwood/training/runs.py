"""Reads what runs left in their folders: manifest, recipe, metrics, answers. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.errors import CorruptError, InputError, unreadable
from budwood.recipe.file import read_recipe_file
from budwood.training.output import MANIFEST, read_manifest

Points = list[tuple[int, float]]
"""Pairs of an optimizer step and a value."""
BOOKKEEPING = ("kind", "step", "tokens", "skipped", "best_step")
"""Fields of a record that are no curves."""


SECTIONS = ("base", "before", "best_metric", "data", "experts", "metrics", "versions")
"""Fields of a manifest that are mappings."""


@dataclass
class RunFiles:
    """The files of a run.

    Attributes:
        manifest: manifest.json.
        recipe: recipe.yaml with every default; {} if the run ended before it was written.
        steps: the records of optimizer steps, and `evaluations` those of evaluations, in order.
        answers: the answers of the last evaluation that generated some: step, prompt, answer and reference.
    """

    directory: Path
    manifest: dict[str, Any]
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    answers: dict[str, Any]

    def curve(self, name: str) -> Points:
        """Return a metric's points: those of evaluations if it begins with "eval_", else those of steps."""
        return curve(self.evaluations if name.startswith("eval_") else self.steps, name)

    @property
    def curves(self) -> list[str]:
        """Names of the metrics of steps, then of evaluations, in the order in which they first occur."""
        names = dict.fromkeys(name for record in (*self.steps, *self.evaluations) for name in record)
        return [name for name in names if name not in BOOKKEEPING and self.curve(name)]

    @property
    def best(self) -> tuple[str, bool]:
        """The metric that selects the run's best adapter, and whether higher is better; ("", False) without one."""
        best = self.manifest.get("best_metric")
        return (str(best["name"]), bool(best["higher"])) if isinstance(best, dict) else ("", False)


def read_run(directory: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        InputError: it is not a run's folder, or it is one whose run has not begun to train.
        CorruptError: manifest.json is damaged.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        if directory.is_dir() and (directory / "sweep.json").is_file():
            text = f"{directory} holds a sweep: name runs of it, such as {directory}/trials/*."
        elif directory.is_dir():
            text = f"{directory} is not a run's folder: it has no {MANIFEST} that Budwood wrote."
        else:
            text = f"{directory}: no such folder: name the output folder of a run, such as runs/name."
        raise InputError(text)
    if not manifest:
        raise CorruptError(f"{directory / MANIFEST} is damaged: resume the run, which writes it again.")
    for key in SECTIONS:
        if not isinstance(manifest.get(key) or {}, dict):
            raise CorruptError(f"{directory / MANIFEST}: '{key}' is damaged: resume the run, which writes it again.")
    recipe = directory / "recipe.yaml"
    try:
        lines = (directory / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise unreadable(directory / "metrics.jsonl", error) from error
    found = [record for record in records(lines) if "kind" in record]
    answers = [record for record in found if record["kind"] == "answers"]
    return RunFiles(
        directory, manifest, read_recipe_file(recipe)[0] if recipe.is_file() else {},
        [record for record in found if record["kind"] == "step"],
        [record for record in found if record["kind"] == "evaluation"],
        answers[-1] if answers else {},
    )  # fmt: skip


def records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects with a step in lines, skipping all others."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def curve(found: Sequence[dict[str, Any]], name: str) -> Points:
    """Return the points of a metric in records; those that lack it as a number are left out."""
    values = ((record["step"], record.get(name)) for record in found)
    return [(step, float(v)) for step, v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def running_mean(points: Points) -> Points:
    """Return the exponential running mean of a curve, with weight 0.1 for each new value."""
    mean, result = points[0][1] if points else 0.0, []
    for step, value in points:
        mean = 0.9 * mean + 0.1 * value
        result.append((step, mean))
    return result
