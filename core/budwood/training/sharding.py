"""How the processes of a run hold its base: whole, or in shards; and what a sharded base cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from budwood.adapters.targets import match_modules
from budwood.contract.registry import Composition
from budwood.contract.types import Run
from budwood.errors import BudwoodError, InputError
from budwood.model.heads import body_of
from budwood.model.recompute import layers_of
from budwood.model.sharding import INSTEAD, check_shards
from budwood.parallel.sharding import is_sharded


def shards_base(run: Run, hooks: Composition, skeleton: Any) -> bool:
    """Return whether the recipe asks the run's processes to shard the base.

    Raises:
        InputError: it cannot be sharded.
    """
    if run.recipe.train.parallel != "shard":
        return False
    if run.processes == 1:
        run.say("note: train.parallel: shard has no effect on a single process")
        return False
    check_shardable(run, hooks, skeleton)
    return True


def check_shardable(run: Run, hooks: Composition, skeleton: Any) -> None:
    """Refuse to shard a base that cannot be, or that the run's strategies need whole; called before it loads.

    Args:
        skeleton: the base without weights and without adapters.

    Raises:
        InputError: the message names the reason.
    """
    if owner := hooks.implements("load_base"):
        raise InputError(f"train.parallel: {owner[0]} loads the base itself, so that it cannot be sharded: {INSTEAD}.")
    check_shards(run.recipe.base.model, skeleton, run.recipe.base.quantization)
    sharded = {id(p) for layer in layers_of(body_of(skeleton)) for p in layer.parameters() if p.ndim > 1}
    for strategy in hooks.strategies:
        if strategy.needs_whole_weights:
            raise InputError(f"train.parallel: {strategy} needs the base's weights whole: {INSTEAD}.")
        for path in match_modules(skeleton, getattr(strategy.options, "modules_to_save", ())):
            if any(id(p) in sharded for p in skeleton.get_submodule(path).parameters()):
                text = f"'{path}' of modules_to_save of {strategy} is in a layer of the sharded base"
                raise InputError(f"train.parallel: {text}: {INSTEAD}.")


def describe_processes(run: Run) -> str:
    """Return a line on how the run's processes hold the base."""
    how = "holds its share of the base's layers" if run.sharded else "holds the base"
    return f"{run.processes} processes: each {how} (train.parallel: {'shard' if run.sharded else 'replicate'})"


@contextmanager
def naming_whole_weights(run: Run) -> Iterator[None]:
    """Name a strategy that reads weights of a sharded base between passes, other than by `linear_weight`.

    Raises:
        InputError: the message names the remedy.
    """
    try:
        yield
    except BudwoodError as error:
        if not run.sharded or "DTensor" not in str(error):
            raise
        strategy = str(error).partition(", hook ")[0]
        raise InputError(f"train.parallel: {strategy} needs the base's weights whole: {INSTEAD}.") from error


def check_trained(run: Run) -> None:
    """Refuse to train a weight of a sharded base.

    Raises:
        InputError: the message names the weight.
    """
    for group in run.groups if run.sharded else ():
        for name, parameter in group.parameters.items():
            if is_sharded(parameter):
                text = f"'{name}' of {group.name} trains, but is a weight of the sharded base"
                raise InputError(f"train.parallel: {text}: {INSTEAD}.")
