"""Find the checkpoint to resume from, and check that the run is still the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from budwood.contract.types import Run
from budwood.errors import InputError, plural
from budwood.parallel.processes import Processes
from budwood.parallel.together import share
from budwood.recipe.file import read_recipe_file
from budwood.recipe.schema import Recipe, build_composition
from budwood.training.durability.changes import NOTED, Change, accept, compare, is_open
from budwood.training.durability.reading import Checkpoint, find_newest
from budwood.training.output import read_manifest
from budwood.training.report import Report


@dataclass
class Resume:
    """A checkpoint to resume from, and the accepted changes since it was saved."""

    checkpoint: Checkpoint
    accept_changes: bool = False
    changes: list[Change] = field(default_factory=list)

    def compare(self, now: dict[str, Any], run: Run) -> None:
        """Compare the part of the run's setting that is known so far.

        Raises:
            InputError: a change was not accepted, or cannot be.
        """
        differences = compare(self.checkpoint.setting, now)
        for change in differences:
            if change.field in NOTED:
                dropout = ", and dropout draws other masks" if change.field == "processes" else ""
                run.say(f"note: {change}: results may differ in the last digits from an uninterrupted run{dropout}")
        where = str(self.checkpoint.directory)
        changes = accept([c for c in differences if c.field not in NOTED], where, self.accept_changes)
        for change in changes:
            run.say(f"accepted: {change}")
        self.changes += changes

    def check_steps(self, run: Run) -> None:
        """Check that the run does not end before the checkpoint's step.

        Raises:
            InputError: it does.
        """
        if (run.steps or 0) < self.checkpoint.step:
            raise InputError(
                f"{self.checkpoint.directory}: a run of {plural(run.steps or 0, 'step')} ends before this "
                "checkpoint: raise train.steps or train.epochs."
            )

    @property
    def accepted(self) -> list[dict[str, Any]]:
        """All changes accepted so far, as stored in manifests."""
        now = [{"step": self.checkpoint.step, **change._asdict()} for change in self.changes]
        return [*self.checkpoint.accepted, *now]


def find_resume(recipe: Recipe, report: Report, accept_changes: bool) -> Resume | Run | None:
    """Return the checkpoint to resume from, the run itself if it is finished, or None if there is no checkpoint yet.

    Raises:
        InputError: the run is finished, and the recipe has changed.
        CorruptError: there are checkpoints, but none is valid.
    """
    found = share("resume", lambda: _find(recipe, report, accept_changes))
    if "finished" in found:
        return _finished(recipe, found["finished"])
    if "checkpoint" not in found:
        return None
    directory, step, setting, accepted = found["checkpoint"]
    return Resume(Checkpoint(Path(directory), step, setting, accepted), accept_changes)


def _find(recipe: Recipe, report: Report, accept_changes: bool) -> dict[str, Any]:
    """Look for what to resume in the folder, which only the first process need see; see `find_resume`."""
    directory = recipe.output
    manifest = read_manifest(directory)
    if manifest is None:
        report.say(f"{directory} holds no run to resume: starting from the beginning")
        return {}
    if manifest.get("finished"):
        before, _ = read_recipe_file(directory / "recipe.yaml")
        now = recipe.to_dict(build_composition(recipe).strategies)
        differences = compare({"recipe": before}, {"recipe": now})
        left_open = manifest.get("chosen", ())  # by the recipe; the run chose the value
        differences = [change for change in differences if not (is_open(change.now) and change.field in left_open)]
        changes = accept(differences, f"the finished run in {directory}", accept_changes)
        if all(change.field == "recipe.output" for change in changes):
            report.say(f"{directory}: the run is finished at step {manifest['step']}; there is nothing to resume")
            return {"finished": manifest}
    checkpoint = find_newest(directory, report.say)
    if checkpoint is None:
        report.say(f"{directory} holds no checkpoint: starting from the beginning")
        return {}
    report.say(f"resuming from step {checkpoint.step}, {checkpoint.directory}")
    return {"checkpoint": [str(checkpoint.directory), checkpoint.step, checkpoint.setting, checkpoint.accepted]}


def _finished(recipe: Recipe, manifest: dict[str, Any]) -> Run:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[manifest["precision"]]
    world = Processes.from_environment()
    run = Run(recipe, recipe.output, torch.device(manifest["device"]), dtype, seed=recipe.train.seed, world=world)
    run.step, run.steps = manifest["step"], manifest["steps"]
    run.before, run.metrics = (
        {name: math.nan if value is None else value for name, value in manifest[part].items()}
        for part in ("before", "metrics")
    )
    return run
