"""How far a run has come beside what stands in `Run`: its best evaluation, its scaler, what it has counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from budwood.contract.registry import Composition
from budwood.contract.types import Event, Run
from budwood.data.packing import plan_epoch
from budwood.training.report import Report


@dataclass
class Best:
    """The best evaluation so far, with a copy on the CPU of what trained."""

    value: float = float("inf")
    step: int = 0
    parameters: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    without_gain: int = 0
    evaluated: int = -1
    """Step of the last evaluation."""


@dataclass
class Progress:
    """What the loop itself has to remember from one optimizer step to the next."""

    scaler: torch.amp.GradScaler
    best: Best = field(default_factory=Best)
    skipped: int = 0
    """Optimizer steps in a row, up to now, that the fp16 scaler skipped."""
    examples: int = 0
    """Training examples seen, over all epochs and processes: the position in the data."""


def evaluate(run: Run, hooks: Composition, report: Report, best: Best) -> dict[str, float]:
    """Call the `evaluate` hook and record its metrics; keeps the parameters of the best evaluation.

    Does nothing where this step was evaluated already, or there is nothing to evaluate on.
    """
    if run.eval_examples is None or best.evaluated == run.step:
        return {}
    metrics = {k: v for found in hooks.call("evaluate", run=run) for k, v in found.items()}
    report.record("evaluation", run.step, metrics)
    hooks.notify(Event("evaluation", run.step, metrics), report.say)
    run.metrics |= metrics
    best.evaluated = run.step
    value = metrics[run.task.best_metric]
    if run.step == 0 or not run.adapter_final:  # what may still change shape cannot be put back
        return metrics
    if value < best.value:
        best.value, best.step, best.without_gain, best.metrics = value, run.step, 0, metrics
        best.parameters = [p.detach().cpu().clone() for p in run.trainable]
    else:
        best.without_gain += 1
    return metrics


def restore(run: Run, best: Best) -> None:
    """Put the best evaluation's parameters back, where a later one was not the best."""
    if best.step and best.step != run.step:
        with torch.no_grad():
            for parameter, kept in zip(run.trainable, best.parameters, strict=True):
                parameter.copy_(kept)
        run.metrics |= best.metrics  # what is reported is what is written
    run.metrics["best_step"] = best.step or run.step


def planned_steps(run: Run, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, example indices) of each optimizer step of the run from `first` on, which is counted from 0."""
    number, epoch, recipe, examples = 0, 0, run.recipe.train, run.examples
    sizes = (recipe.batch_tokens, recipe.batch_examples, examples.groups)
    while number < (run.steps or 0):
        for indices in plan_epoch(examples.lengths, run.seed, epoch, *sizes):
            if first <= number < (run.steps or 0):
                yield epoch, indices
            number += 1
        epoch += 1
