"""Which layers of a run recompute their activations: checks of the recipe, and the number where it says auto."""

from __future__ import annotations

from typing import Any

from budwood.contract.types import Run
from budwood.model.recompute import find_problem, layers_of
from budwood.recipe.schema import Recipe

FIELD = "train.gradient_checkpointing"


def find_problems(recipe: Recipe, model: Any) -> list[str]:
    """Return why a base, without weights, cannot be recomputed as a recipe says, in one line; [] if it can."""
    setting = recipe.train.gradient_checkpointing
    problem = find_problem(model, setting) if model is not None else None
    if problem is None and recipe.train.activation_offloading and model is not None and not layers_of(model):
        problem = f"{type(model).__name__} has no layers whose inputs train.activation_offloading could move"
    return [f"{recipe.where('train', 'gradient_checkpointing')}: {FIELD}: {problem}."] if problem else []


def settled(count: int, layers: int) -> bool | int:
    """Return the value of the recipe's field for `count` of all layers."""
    return count if 0 < count < layers else count > 0


def settle(run: Run, setting: bool | int) -> None:
    """Set what a run recomputes, in its recipe too, which is recorded."""
    run.recipe = run.recipe.with_train(run.recipe.train.model_copy(update={"gradient_checkpointing": setting}))


def settle_as_before(run: Run, setting: dict[str, Any]) -> None:
    """Set what a checkpoint's run recomputed, if the recipe leaves it open.

    Args:
        setting: recorded in the checkpoint.
    """
    before = ((setting.get("recipe") or {}).get("train") or {}).get("gradient_checkpointing")
    if run.recipe.train.gradient_checkpointing == "auto" and isinstance(before, int):
        settle(run, before)


def describe(run: Run) -> str:
    """Return what a run recomputes and offloads, as the end of a line; "" if nothing."""
    train = run.recipe.train
    layers = layers_of(run.model)
    count = sum(bool(layer.gradient_checkpointing) for layer in layers)
    if not train.gradient_checkpointing:
        return ""
    where = ", their inputs in the host's memory" if train.activation_offloading else ""
    return f"; {count} of {len(layers)} layers recompute their activations{where}" if layers else ""
