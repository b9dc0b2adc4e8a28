"""The training loop's state in addition to `Run`: best evaluation, gradient scaler and counters; and evaluation."""

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
    """The best evaluation so far, with a copy of its parameters on the CPU."""

    metric: str = ""
    """Name of the metric that decides."""
    higher: bool = False
    """Whether a higher value is better."""
    value: float = float("nan")
    step: int = 0
    """0: no evaluation yet."""
    parameters: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    eval_tokens: int = 0
    """`Run.eval_tokens` at that evaluation."""
    without_gain: int = 0
    evaluated: int = -1
    """Step of the last evaluation."""
    not_finite: list[str] = field(default_factory=list)
    """Metrics that were non-finite in some evaluation and have been reported."""


@dataclass
class Progress:
    """State that the training loop carries from one optimizer step to the next."""

    scaler: torch.amp.GradScaler
    best: Best = field(default_factory=Best)
    skipped: int = 0
    """Number of consecutive optimizer steps skipped up to now because they were not finite."""
    examples: int = 0
    """Number of examples of `run.examples` drawn, over all epochs and processes: the position in the data."""
    active: ActiveSet | None = None
    """On-policy examples of the current optimizer steps."""


def evaluate(run: Run, hooks: Composition, report: Report, best: Best) -> dict[str, float]:
    """Call the `evaluate` hook and record its metrics; keeps the parameters of the best evaluation.

    A run with an average evaluates the averaged parameters and always restores the others afterwards. Does nothing if
    this step was already evaluated or there is no evaluation data.

    Raises:
        PluginError: the evaluation lacks the run's best metric.
    """
    if run.eval_examples is None or best.evaluated == run.step:
        return {}
    previous = put_average(run)
    try:
        metrics = _measure(run, hooks)
        report.record("evaluation", run.step, metrics)
        if run.answers:
            report.record("answers", run.step, {"answers": run.answers})
        hooks.notify(Event("evaluation", run.step, metrics), report.say)
        run.metrics |= metrics
        best.evaluated = run.step
        _report_not_finite(run, metrics, best)
        _rank(run, metrics, best)
    finally:
        put_back(run, previous)
    return metrics


def _measure(run: Run, hooks: Composition) -> dict[str, float]:
    """Call the hook, and again if it had to reduce the batch size, so that all batches have the same size.

    The composition of the batches affects the last digits, and which process evaluates which examples.
    """
    while True:
        tokens = run.eval_tokens
        metrics: dict[str, float] = {}
        for plugin, values in _with_plugins(hooks, hooks.call("evaluate", run=run)):
            for name, value in values.items():
                hooks.claim(name, plugin, "evaluate")
                metrics[name] = value
        run.eval_tokens = min(run.world.gather(run.eval_tokens))
        if run.eval_tokens == tokens:
            return metrics


def _with_plugins(hooks: Composition, results: list[dict[str, float]]) -> Iterator[tuple[Any, dict[str, float]]]:
    """Pair each result of `evaluate` with its plugin; results added by wrappers count as the outermost wrapper's."""
    calls = hooks.calls("evaluate")
    inner = [call.plugin for call in calls if not call.wraps]
    outermost = calls[0].plugin if calls else None
    yield from zip_longest(inner[: len(results)], results, fillvalue=outermost)


def _report_not_finite(run: Run, metrics: dict[str, float], best: Best) -> None:
    """Report a NaN or infinite metric, once per run and metric."""
    for name in [n for n, value in metrics.items() if not math.isfinite(value) and n not in best.not_finite]:
        best.not_finite.append(name)
        run.say(f"warning: step {run.step}: {name} is {metrics[name]}; such an evaluation never counts as the best")


def _rank(run: Run, metrics: dict[str, float], best: Best) -> None:
    """Keep the evaluated parameters if they are the best so far by the run's best metric."""
    metric = run.best_metric
    assert metric is not None  # a run that evaluates has a task, which sets a best metric
    if metric.name not in metrics:
        raise PluginError(
            f"{metric.owner or 'a strategy'} chose '{metric.name}' as the best metric, but the evaluation of step "
            f"{run.step} returned only {', '.join(metrics) or 'nothing'}."
        )
    if run.step == 0 or not run.adapter_final:  # parameters that may still change shape cannot be restored
        return
    if best.step and (best.metric, best.higher) != (metric.name, metric.higher):
        run.say(
            f"note: the best evaluation so far was chosen by {best.metric}; the choice starts over by {metric.name}"
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
    """Set the run's final parameters: the best evaluation's, otherwise the average, otherwise the last."""
    if best.step:
        with torch.no_grad():
            for parameter, value in zip(run.trainable, best.parameters, strict=True):
                parameter.copy_(value)
        run.metrics |= best.metrics  # the reported metrics are those of the written adapter
        run.eval_tokens = best.eval_tokens or run.eval_tokens
    else:
        put_average(run)
    run.metrics["best_step"] = best.step or run.step


def planned_steps(run: Run, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, example indices) for each planned step of the run, starting at step `first`, counted from 0."""
    number, epoch, recipe, examples = 0, 0, run.recipe.train, run.examples
    sizes = (recipe.batch_tokens, recipe.batch_examples, examples.groups)
    while number < (run.steps or 0):
        for indices in plan_epoch(examples.lengths, run.seed, epoch, *sizes):
            if first <= number < (run.steps or 0):
                yield epoch, indices
            number += 1
        epoch += 1
