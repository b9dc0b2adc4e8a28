"""How far a run has come beside what stands in `Run`: its best evaluation, its scaler, what it has counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.contract.discovery import PluginError
from budwood.contract.registry import Composition
from budwood.contract.types import Event, Run
from budwood.data.packing import plan_epoch
from budwood.training.averages import put_average, put_back
from budwood.training.on_policy import ActiveSet
from budwood.training.report import Report


@dataclass
class Best:
    """The best evaluation so far, with a copy on the CPU of the parameters that it measured."""

    metric: str = ""
    """What it is the best by: a metric's name."""
    higher: bool = False
    """Whether a higher value of it is better."""
    value: float = float("nan")
    step: int = 0
    """0: there is none."""
    parameters: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    eval_tokens: int = 0
    """`Run.eval_tokens` as it was."""
    without_gain: int = 0
    evaluated: int = -1
    """Step of the last evaluation."""
    not_finite: list[str] = field(default_factory=list)
    """Metrics that some evaluation found not finite; each was reported then."""


@dataclass
class Progress:
    """What the loop itself has to remember from one optimizer step to the next."""

    scaler: torch.amp.GradScaler
    best: Best = field(default_factory=Best)
    skipped: int = 0
    """Optimizer steps in a row, up to now, that the fp16 scaler skipped."""
    examples: int = 0
    """Examples of `run.examples` drawn, over all epochs and processes: the position in the data."""
    active: ActiveSet | None = None
    """On-policy examples whose optimizer steps are under way."""


def evaluate(run: Run, hooks: Composition, report: Report, best: Best) -> dict[str, float]:
    """Call the `evaluate` hook and record its metrics; keeps the parameters of the best evaluation.

    They are the averaged ones if the run has an average; whatever happens, the others are in their place afterwards.
    Does nothing if this step was evaluated already, or there is nothing to evaluate on.

    Raises:
        PluginError: the evaluation lacks the run's best metric.
    """
    if run.eval_examples is None or best.evaluated == run.step:
        return {}
    own = put_average(run)
    try:
        metrics = _measure(run, hooks)
        report.record("evaluation", run.step, metrics)
        hooks.notify(Event("evaluation", run.step, metrics), report.say)
        run.metrics |= metrics
        best.evaluated = run.step
        _report_not_finite(run, metrics, best)
        _rank(run, metrics, best)
    finally:
        put_back(run, own)
    return metrics


def _measure(run: Run, hooks: Composition) -> dict[str, float]:
    """Call the hook; again if memory made its batches smaller on the way, so that they are all of one size.

    What stands in a batch decides the last digits, and which process measures which examples.
    """
    while True:
        tokens = run.eval_tokens
        metrics: dict[str, float] = {}
        for plugin, found in _given(hooks, hooks.call("evaluate", run=run)):
            for name, value in found.items():
                hooks.claim(name, plugin, "evaluate")
                metrics[name] = value
        if run.processes > 1:
            least = torch.tensor(run.eval_tokens, device=run.device)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
            run.eval_tokens = int(least)
        if run.eval_tokens == tokens:
            return metrics


def _given(hooks: Composition, results: list[dict[str, float]]) -> Iterator[tuple[Any, dict[str, float]]]:
    """Each result of `evaluate` with the plugin that gave it; a result that a wrapper added is the outermost one's."""
    calls = hooks.calls("evaluate")
    inner = [call.plugin for call in calls if not call.wraps]
    outermost = calls[0].plugin if calls else None
    yield from zip_longest(inner[: len(results)], results, fillvalue=outermost)


def _report_not_finite(run: Run, metrics: dict[str, float], best: Best) -> None:
    """Say once in a run, for each metric, that it is NaN or infinite."""
    for name in [n for n, value in metrics.items() if not math.isfinite(value) and n not in best.not_finite]:
        best.not_finite.append(name)
        run.say(f"warning: step {run.step}: {name} is {metrics[name]}; such an evaluation is never the best by it")


def _rank(run: Run, metrics: dict[str, float], best: Best) -> None:
    """Keep the evaluated parameters if they are the best so far by the run's best metric."""
    metric = run.best_metric
    assert metric is not None  # a run that evaluates has a task, which names one
    if metric.name not in metrics:
        raise PluginError(
            f"{metric.owner or 'a strategy'} chose '{metric.name}' as the best metric, and the evaluation of step "
            f"{run.step} gives only {', '.join(metrics) or 'nothing'}."
        )
    if run.step == 0 or not run.adapter_final:  # what may still change shape cannot be put back
        return
    if best.step and (best.metric, best.higher) != (metric.name, metric.higher):
        run.say(
            f"note: the best evaluation so far was chosen by {best.metric}; the choice begins anew by {metric.name}"
        )
        best.step = 0
    value, sign = metrics[metric.name], 1 if metric.higher else -1
    if math.isfinite(value) and (best.step == 0 or sign * value > sign * best.value):
        best.metric, best.higher, best.value, best.step = metric.name, metric.higher, value, run.step
        best.without_gain, best.metrics, best.eval_tokens = 0, metrics, run.eval_tokens
        best.parameters = [p.detach().cpu().clone() for p in run.trainable]
    else:
        best.without_gain += 1


def restore(run: Run, best: Best) -> None:
    """Put the parameters in place that the run ends with: the best evaluation's, else the average, else the last."""
    if best.step:
        with torch.no_grad():
            for parameter, kept in zip(run.trainable, best.parameters, strict=True):
                parameter.copy_(kept)
        run.metrics |= best.metrics  # what is reported is what is written
        run.eval_tokens = best.eval_tokens or run.eval_tokens
    else:
        put_average(run)
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
