"""On-policy data: sets of examples that a strategy generates with the current model, and their state in checkpoints.

One set is generated per planned step, with that step's examples as prompts, and is used for `updates` optimizer steps.
A checkpoint taken in the middle of a set contains the set, since the weights that sampled it no longer exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Column, Example
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.contract.types import Run
from budwood.data.checking import check_examples
from budwood.data.examples import Examples, pack
from budwood.data.ragged import Ragged
from budwood.errors import InputError


@dataclass(frozen=True)
class ActiveSet:
    """The generated examples of several consecutive optimizer steps.

    Attributes:
        start: `Run.step` at generation, which is the step number of the set's first optimizer step.
        states: per optimizer step, the arrays of its examples, as saved in a checkpoint.
        steps: per optimizer step, its examples, always built from these arrays.
    """

    start: int
    states: list[dict[str, Any]]
    steps: list[Examples]

    def is_used_up(self, step: int) -> bool:
        """Whether optimizer step `step`, counted like `Run.step`, is past the last one of the set."""
        return step >= self.start + len(self.steps)

    def examples_of(self, step: int) -> Examples:
        """Return the examples of optimizer step `step`."""
        return self.steps[step - self.start]


def find_generator(hooks: Composition) -> Strategy | None:
    """Return the strategy that implements `next_examples`; None if the run trains on the data itself."""
    calls = hooks.calls("next_examples")
    return calls[0].plugin if calls else None


def updates_of(hooks: Composition) -> int:
    """Return the number of optimizer steps per planned step.

    Raises:
        PluginError: the strategy's `updates` is not a whole number from 1.
    """
    strategy = find_generator(hooks)
    updates = 1 if strategy is None else strategy.updates
    if type(updates) is not int or updates < 1:
        raise PluginError(f"{strategy}: updates must be a whole number from 1, not {updates!r}.")
    return updates


def sets_started(hooks: Composition, step: int) -> int:
    """Return the number of planned steps that the first `step` optimizer steps have drawn."""
    return -(-step // updates_of(hooks))


def generate_set(run: Run, hooks: Composition, prompts: np.ndarray) -> ActiveSet:
    """Generate the next set. Every process generates for its share of the prompts, and receives the complete set.

    Args:
        prompts: indices into `run.examples`.

    Raises:
        PluginError: the set is invalid; the message names the strategy.
        InputError: the strategy called `run.generate` with invalid arguments; the message names the strategy.
    """
    where = f"{find_generator(hooks)}, hook next_examples, step {run.step + 1}"
    share = [int(index) for index in prompts[run.process_index :: run.processes]]
    try:
        with torch.no_grad():
            own: Sequence[Sequence[Example]] = hooks.call("next_examples", run=run, indices=share)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    run._generators.clear()  # so that every attempt at the step draws the same numbers
    gathered = run.world.gather([list(step) for step in own])
    updates = updates_of(hooks)
    for entries in gathered:
        if len(entries) != updates:
            raise PluginError(f"{where}: {len(entries)} entries; return one for each of `updates` = {updates}.")
    states = []
    for number in range(updates):
        shares = enumerate(entries[number] for entries in gathered)
        examples = [_with_unique_group(example, rank, run.processes) for rank, share in shares for example in share]
        try:
            states.append(_pack_step(run, examples))
        except (InputError, ValueError) as error:
            raise PluginError(f"{where}, entry {number + 1}: {error}") from error
    return ActiveSet(run.step, states, [_unpack_step(run, state) for state in states])


def _with_unique_group(example: Example, rank: int, processes: int) -> Example:
    """Return the example with a group number that no other process uses."""
    return example if example.group is None else replace(example, group=example.group * processes + rank)


def _pack_step(run: Run, examples: Sequence[Example]) -> dict[str, Any]:
    """Convert one optimizer step's examples to arrays, columns included.

    Raises:
        InputError, ValueError: an example or a column is invalid.
    """
    if not examples:
        raise ValueError("there is no example.")
    check_examples(examples, run.examples)
    for example in examples:
        if not len(example.label_positions):
            raise ValueError(f"example {example.key!r} has no labels, so it would train nothing.")
        if example.columns.keys() != examples[0].columns.keys():
            differ = ", ".join(sorted(example.columns.keys() ^ examples[0].columns.keys()))
            raise ValueError(f"column {differ} is in only one of the examples {examples[0].key!r} and {example.key!r}.")
    columns = {name: _pack_column(name, examples) for name in examples[0].columns}
    return {"arrays": pack(examples, run.task), "columns": columns}


def _pack_column(name: str, examples: Sequence[Example]) -> dict[str, Any]:
    columns = [example.columns[name] for example in examples]
    for example, column in zip(examples, columns, strict=True):
        if not isinstance(column, Column) or column.values.dtype.kind not in "biuf":
            raise ValueError(f"column {name} of example {example.key!r} must be a Column of numbers.")
        if (column.axis, column.values.ndim) != (columns[0].axis, columns[0].values.ndim):
            raise ValueError(
                f"column {name} of example {example.key!r} differs in axis or rank from the first example's."
            )
    ragged = Ragged.of([column.values for column in columns])
    return {"axis": columns[0].axis, "values": ragged.values, "shapes": ragged.shapes}


def _unpack_step(run: Run, state: dict[str, Any]) -> Examples:
    """Undo `_pack_step`."""
    columns = {name: (Ragged(c["values"], c["shapes"]), c["axis"]) for name, c in state["columns"].items()}
    count = len(state["arrays"]["lengths"])
    per_example = [{name: Column(values[i], axis) for name, (values, axis) in columns.items()} for i in range(count)]
    return run.examples.with_arrays(state["arrays"], per_example)


def active_state(active: ActiveSet | None, run: Run) -> dict[str, Any] | None:
    """Return the set's state for a checkpoint; None if a resumed run starts with a new set."""
    if active is None or active.is_used_up(run.step):
        return None
    return {"start": active.start, "steps": active.states}


def load_active_state(run: Run, hooks: Composition, state: dict[str, Any] | None) -> ActiveSet | None:
    """Rebuild the set from `active_state`'s result; None if no strategy generates examples any more."""
    if state is None or find_generator(hooks) is None:
        return None
    return ActiveSet(int(state["start"]), state["steps"], [_unpack_step(run, step) for step in state["steps"]])
