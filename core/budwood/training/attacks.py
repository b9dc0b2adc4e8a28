"""`--attack NAME:KEY=VALUE,…`: parse attacks, and evaluate a model under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from budwood.contract.attack import Attack
from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.contract.registry import Composition
from budwood.contract.types import Run, Step
from budwood.data.examples import Examples
from budwood.training.batches import count_units
from budwood.training.step import Engine


def changes_rows(attack: Attack) -> bool:
    """Whether the attack changes data rows."""
    return type(attack).change is not Attack.change


def measure_attacked(
    run: Run,
    attack: Attack,
    build: Callable[[Callable[[Mapping[str, Any], int], Mapping[str, Any]]], Examples],
    clean: Mapping[str, float],
) -> dict[str, float]:
    """Return the metrics of the run's model under an attack; reports what it changed and warns if it had no effect.

    Args:
        run: the run of the clean evaluation; not modified.
        attack: changes rows before tokenization, or adds noise to the embeddings.
        build: builds examples from changed rows.
        clean: metrics without the attack.
    """
    task, noisy = run.task, type(attack).noise is not Attack.noise
    attacked = dataclasses.replace(run)
    if changes_rows(attack):
        attacked.eval_examples = _changed(run, attack, build)
    if noisy:  # text generated under noise is meaningless
        train = run.recipe.train.model_copy(update={"eval_generate": 0})
        attacked.recipe = run.recipe.model_copy(update={"train": train})
    metrics: dict[str, float] = task.measure(attacked, _noise_function(attacked, attack) if noisy else None)
    if noisy and not metrics["eval_loss"] > clean["eval_loss"]:
        run.say(f"warning: {attack.name} did not raise the loss: its noise is too small, or overshoots")
    return metrics


def _changed(run: Run, attack: Attack, build: Callable[..., Examples]) -> Examples:
    assert run.eval_examples is not None
    data_format, changed, rows = run.eval_examples.format, 0, 0

    def change(row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        nonlocal changed, rows
        with attribute_errors(attack, "change"):
            new = attack.change(row, index, data_format)
        if not isinstance(new, Mapping):
            raise PluginError(f"{attack}, change: returned a {type(new).__name__}; it must return the row, a mapping.")
        rows, changed = rows + 1, changed + (new != row)
        return new

    examples = build(change)
    run.say(
        f"{attack.name}: {changed:,} of {rows:,} rows changed" if changed else f"warning: {attack.name} changed no row"
    )
    before = len(run.eval_examples)
    if len(examples) != before:
        run.say(
            f"warning: {attack.name}: {len(examples):,} of {before:,} examples remain, so the "
            f"metrics do not cover the same rows: {examples.describe_dropped()}"
        )
    return examples


def _noise_function(run: Run, attack: Attack) -> Callable[[Batch], Tensor | None]:
    """Return a function that computes the attack's noise for a batch."""
    hooks = Composition([])
    hooks.register_core(run.task, f"task {run.task.name}")
    engine = Engine(run, hooks)

    def compute_noise(batch: Batch) -> Tensor | None:
        engine.reset_step()
        run.counts = count_units(run, hooks, [batch])
        step = Step(run, batch, engine)
        with torch.enable_grad(), attribute_errors(attack, "noise"):
            noise = attack.noise(step)
        if noise is not None and not (isinstance(noise, Tensor) and noise.shape == step.zero_noise().shape):
            actual = list(noise.shape) if isinstance(noise, Tensor) else f"a {type(noise).__name__}"
            expected = list(step.zero_noise().shape)
            raise PluginError(f"{attack}, noise: returned {actual}; it must return None or a tensor {expected}.")
        return noise

    return compute_noise
