"""Judges by its losses whether a run learned anything, and advises what to change if it did not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from budwood.contract.types import Run
from budwood.data.examples import Examples
from budwood.errors import plural
from budwood.training.on_policy import find_generator

FALL = 0.05
"""Relative fall of the loss from which a run counts as having learned."""
HEART = 0.5
"""Fall of the training loss with which a run that learned little for other rows has learned its own by heart."""
LOW = 0.1
"""A first loss below this, in nats per label, leaves little to learn."""
FEW = 50
"""A run with fewer steps is first advised to take more."""
ROUNDING = 1e-6
"""Difference of accuracies that are the same."""


def advice(run: Run, metrics: Path) -> str:
    """Return a line of advice for a run that learned little, otherwise "".

    A run learned little if its loss fell by less than 5 %, or is still no better than a uniform guess, ln(number of
    tokens or classes) nats, or than a classifier is without its inputs (see `_without_inputs`). The loss is that of the
    evaluations before and after training. Without them, it is the training loss: the mean of the first and of the last
    tenth of the steps, at least three if there are six. No advice is given if the first loss is below 0.1, if the run
    trains on generated examples, or if its best metric is another one and improved. A metric of an objective is judged
    alone, since the task's loss may rise. If the training loss halved nevertheless, the advice is against overfitting.
    """
    if find_generator(run.hooks) is not None:
        return ""
    best = run.best_metric
    if best is not None and best.name != "eval_loss" and best.name in run.before and best.name in run.metrics:
        gain = run.metrics[best.name] - run.before[best.name]
        if (gain if best.higher else -gain) > 0:
            return ""
        if best.owner != str(run.task):
            name = best.name.removeprefix("eval_").replace("_", " ")
            change = f"{run.before[best.name]:.4f} before, {run.metrics[best.name]:.4f} after"
            remedy = f"raise {_length(run)} and {_rows(run)}, or change {_rate(run)}"
            return f"note: {name} did not improve ({change}): {remedy}"
    evaluated = "eval_loss" in run.before and "eval_loss" in run.metrics
    if evaluated:
        before, after = run.before["eval_loss"], run.metrics["eval_loss"]
    else:
        before, after = _training_losses(metrics)
    if not (math.isfinite(before) and math.isfinite(after)) or before < LOW:
        return ""
    guess = _guess(run)
    if after < min((1 - FALL) * before, guess):
        text = _without_inputs(run, metrics, after if evaluated else None)
        return f"note: {text}: raise {_length(run)} and {_rows(run)}, or change {_rate(run)}" if text else ""
    train, change = run.recipe.train, f"{before:.4f} before, {after:.4f} after"
    if after < (1 - FALL) * before:
        text = f"the loss ({change}) is no better than a uniform guess ({guess:.2f})"
    else:
        text = f"the loss hardly changed ({change})" if after <= before else f"the loss rose ({change})"
    batch = f"train.batch_{'examples' if train.batch_examples else 'tokens'}"
    rate, more, rows = _rate(run), _length(run), _rows(run)
    start, end = _training_losses(metrics, run.task.name.replace("-", "_"))
    if evaluated and end < (1 - HEART) * start:
        learned = f"the training rows' fell from {start:.4f} to {end:.4f}, so they were learned by heart"
        return f"note: {text}, but {learned}: raise {rows}, or lower {more}"
    if after > before:
        return f"note: {text}: lower {rate}, or raise {rows}"
    if (run.steps or 0) < FEW:
        steps = plural(run.steps or 0, "step")
        return f"note: {text} in only {steps}: raise {more} or lower {batch}; then raise {rate} and {rows}"
    return f"note: {text}: raise {rate}; then raise {more} and {rows}"


def _rate(run: Run) -> str:
    return f"train.learning_rate (now {run.recipe.train.learning_rate:g})"


def _length(run: Run) -> str:
    train = run.recipe.train
    return f"train.{'steps' if train.steps else 'epochs'} (now {train.steps or train.epochs})"


def _rows(run: Run) -> str:
    return f"the number of rows (now {len(np.unique(run.examples.groups)):,})"


def _guess(run: Run) -> float:
    """Return the loss of a uniform guess; infinite if the task's outputs are not tokens or classes."""
    outputs: Any = len(run.examples.labels) or getattr(run.model.config, "vocab_size", 0)
    return math.log(outputs) if run.task.has_log_probs() and outputs else math.inf


def _without_inputs(run: Run, metrics: Path, loss: float | None) -> str:
    """Return in what a classifier is no better than one that ignores its inputs; empty if it is better.

    Without inputs, the best loss is that of the frequencies of the classes in the training data, and the best accuracy
    that of one class. With an evaluation, neither may be better: a loss may rise from overconfidence, and a rare class
    may be ranked well, but never predicted.

    Args:
        loss: of the last evaluation; None: there is none, and that of the last steps counts, without strategies' terms.
    """
    if not run.examples.labels or not run.task.has_log_probs():
        return ""
    shares = _shares(run.examples)
    seen = shares if loss is None or run.eval_examples is None else _shares(run.eval_examples)
    occurs = seen > 0
    with np.errstate(divide="ignore"):
        least = min(float(-(seen[occurs] * np.log(shares[occurs])).sum()), math.log(len(shares)))
    accuracy = None if loss is None else run.metrics.get("eval_accuracy")
    if loss is None:
        _, loss = _training_losses(metrics, run.task.name.replace("-", "_"))
    if least < LOW or not loss >= (1 - FALL) * least:
        return ""
    if accuracy is None:
        return f"the loss ({loss:.4f}) is no better than always giving the frequencies of the classes ({least:.4f})"
    constant = float(seen.max())
    if accuracy > constant + ROUNDING:
        return ""
    return f"the accuracy ({accuracy:.4f}) is no better than always giving the most frequent class ({constant:.4f})"


def _shares(examples: Examples) -> np.ndarray:
    """Return the share of each class in the weights of all labels, [classes]."""
    weights = examples.class_weights
    return weights / (weights.sum() or 1.0)


def _training_losses(metrics: Path, name: str = "loss") -> tuple[float, float]:
    """Return the mean of a loss in the first and in the last tenth of the steps; NaN if there are fewer than two."""
    losses = []
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == "step" and isinstance(record.get(name), float):
            losses.append(record[name])
    size = max(len(losses) // 10, min(len(losses) // 2, 3))
    if len(losses) < 2:
        return math.nan, math.nan
    return sum(losses[:size]) / size, sum(losses[-size:]) / size
