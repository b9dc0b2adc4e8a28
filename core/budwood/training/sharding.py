"""How the processes of a run hold its base: whole, or in shards; and what a sharded base cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from budwood.contract.registry import Composition
from budwood.contract.types import Run
from budwood.errors import BudwoodError, InputError
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
    if hooks.implements("load_base"):
        owner = hooks.calls("load_base")[0].plugin
        raise InputError(f"train.parallel: {owner} loads the base itself, so that it cannot be sharded: {INSTEAD}.")
    check_shards(run.recipe.base.model, skeleton, run.recipe.base.quantization)
    return True


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
