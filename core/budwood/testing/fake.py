"""Runs optimizer steps on fake CPU tensors, with every strategy, as `budwood plan` does."""

from __future__ import annotations

from itertools import groupby

import torch

from budwood.contract.types import Run
from budwood.planning.rehearsal import Micro, Rehearsal, rehearse
from budwood.recipe.schema import Recipe


def run_on_fake_tensors(recipe: Recipe) -> Run:
    """Run a recipe's optimizer steps with `run.planning` set, on tensors that have shapes but no values.

    Raises:
        PluginError: a strategy reads a value.
        BudwoodError: as `tune`.
    """
    with rehearse(recipe, torch.float32) as rehearsal:
        run = rehearsal.run
        halves = _halves(rehearsal)
        while run.step < (run.steps or 1):  # two micro-batches in the first step, one in the others to save time
            rehearsal.take_step(halves[: 1 if run.step else 2])
    return run


def _halves(rehearsal: Rehearsal) -> list[Micro]:
    """Divide the groups of the first optimizer step between two micro-batches; one, if it has a single group."""
    members = [index for micro in rehearsal.steps[0] for index in micro.members]
    groups = [list(group) for _, group in groupby(members, lambda index: rehearsal.examples[index].group or -1 - index)]
    halves = [sum(half, []) for half in (groups[::2], groups[1::2]) if half]
    return [rehearsal.micro(half) for half in halves]
