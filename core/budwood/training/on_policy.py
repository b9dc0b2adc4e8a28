"""On-policy data: the sets of examples that a strategy makes with the model as it is, and their place in checkpoints.

A set is drawn for one step of the plan, whose examples are its prompts, and serves `updates` optimizer steps. In
mid-set the weights that sampled it are gone, so that the set itself is part of a checkpoint.
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
from budwood.data.examples import Examples, check_examples, pack
from budwood.data.ragged import Ragged
from budwood.errors import InputError


@dataclass(frozen=True)
class ActiveSet:
    """The examples of some optimizer steps in a row.

    Attributes:
        start: `Run.step` when it was made, and so of its first optimizer step.
        states: arrays of each optimizer step's examples, which a checkpoint holds.
        steps: examples of each optimizer step, which are made of these arrays whether they were saved or not.
    """

    start: int
    states: list[dict[str, Any]]
    steps: list[Examples]

    def is_used_up(self, step: int) -> bool:
        """Whether optimizer step `step`, as `Run.step` counts, is behind its last."""
        return step >= self.start + len(self.steps)

    def examples_of(self, step: int) -> Examples:
        """The examples of optimizer step `step`."""
        return self.steps[step - self.start]


def find_maker(hooks: Composition) -> Strategy | None:
    """The strategy that implements `next_examples`; None if the run trains on the data itself."""
    calls = hooks.calls("next_examples")
    return calls[0].plugin if calls else None


def updates_of(hooks: Composition) -> int:
    """Optimizer steps for each step of the plan.

    Raises:
        PluginError: the strategy's `updates` is not a whole number from 1.
    """
    maker = find_maker(hooks)
    updates = 1 if maker is None else maker.updates
    if type(updates) is not int or updates < 1:
        raise PluginError(f"{maker}: updates must be a whole number from 1, not {updates!r}.")
    return updates


def sets_begun(hooks: Composition, step: int) -> int:
    """Steps of the plan that the first `step` optimizer steps have drawn."""
    return -(-step // updates_of(hooks))


def make_set(run: Run, hooks: Composition, prompts: np.ndarray) -> ActiveSet:
    """Ask for the next set; every process asks for its share of the prompts, and holds the whole set.

    Args:
        prompts: indices into `run.examples`.

    Raises:
        PluginError: the set is not sound; the strategy is named.
        InputError: what the strategy asked of `run.generate` cannot be; the strategy is named.
    """
    maker = find_maker(hooks)
    who = f"{maker}, hook next_examples, step {run.step + 1}"
    share = [int(index) for index in prompts[run.process_index :: run.processes]]
    try:
        with torch.no_grad():
            made: Sequence[Sequence[Example]] = hooks.call("next_examples", run=run, indices=share)
    except InputError as error:
        raise InputError(f"{who}: {error}") from error
    run._generators.clear()  # so that the step draws the same however often it begins
    everyone: list[Any] = [made]
    if run.processes > 1:
        everyone = [None] * run.processes
        torch.distributed.all_gather_object(everyone, [list(step) for step in made])
    updates = updates_of(hooks)
    for found in everyone:
        if len(found) != updates:
            raise PluginError(f"{who}: {len(found)} entries; it must give one for each of `updates` = {updates}.")
    states = []
    for number in range(updates):
        shares = enumerate(found[number] for found in everyone)
        examples = [_renumbered(example, rank, run.processes) for rank, share in shares for example in share]
        try:
            states.append(_pack_step(run, examples))
        except (InputError, ValueError) as error:
            raise PluginError(f"{who}, entry {number + 1}: {error}") from error
    return ActiveSet(run.step, states, [_unpack_step(run, state) for state in states])


def _renumbered(example: Example, rank: int, processes: int) -> Example:
    """The example with a group's number that no other process gives."""
    return example if example.group is None else replace(example, group=example.group * processes + rank)


def _pack_step(run: Run, examples: Sequence[Example]) -> dict[str, Any]:
    """One optimizer step's examples as arrays, columns too.

    Raises:
        InputError, ValueError: an example or a column is not sound.
    """
    if not examples:
        raise ValueError("there is no example.")
    check_examples(examples, run.examples)
    for example in examples:
        if not len(example.label_positions):
            raise ValueError(f"example {example.key!r} has no labels, so that it would train nothing.")
        if example.columns.keys() != examples[0].columns.keys():
            differ = ", ".join(sorted(example.columns.keys() ^ examples[0].columns.keys()))
            raise ValueError(f"column {differ} is not in both of the examples {examples[0].key!r}, {example.key!r}.")
    columns = {name: _pack_column(name, examples) for name in examples[0].columns}
    return {"arrays": pack(examples, run.task), "columns": columns}


def _pack_column(name: str, examples: Sequence[Example]) -> dict[str, Any]:
    columns = [example.columns[name] for example in examples]
    for example, column in zip(examples, columns, strict=True):
        if not isinstance(column, Column) or column.values.dtype.kind not in "biuf":
            raise ValueError(f"column {name} of example {example.key!r} must be a Column of numbers.")
        if (column.axis, column.values.ndim) != (columns[0].axis, columns[0].values.ndim):
            raise ValueError(f"column {name} of example {example.key!r} has another axis or rank than that of others.")
    ragged = Ragged.of([column.values for column in columns])
    return {"axis": columns[0].axis, "values": ragged.values, "shapes": ragged.shapes}


def _unpack_step(run: Run, state: dict[str, Any]) -> Examples:
    """Undo `_pack_step`."""
    columns = {name: (Ragged(c["values"], c["shapes"]), c["axis"]) for name, c in state["columns"].items()}
    count = len(state["arrays"]["lengths"])
    each = [{name: Column(values[i], axis) for name, (values, axis) in columns.items()} for i in range(count)]
    return run.examples.with_arrays(state["arrays"], each)


def active_state(active: ActiveSet | None, run: Run) -> dict[str, Any] | None:
    """What a checkpoint holds of the set; None if a resume begins with a new one."""
    if active is None or active.is_used_up(run.step):
        return None
    return {"start": active.start, "steps": active.states}


def load_active_state(run: Run, hooks: Composition, state: dict[str, Any] | None) -> ActiveSet | None:
    """Take back what `active_state` gave; nothing if no strategy makes examples any more."""
    if state is None or find_maker(hooks) is None:
        return None
    return ActiveSet(int(state["start"]), state["steps"], [_unpack_step(run, step) for step in state["steps"]])
