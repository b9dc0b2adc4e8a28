"""The micro-batches of each optimizer step, and the counts by which its loss terms are divided."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.contract.registry import Composition
from budwood.contract.types import UNITS, Run
from budwood.data.examples import Examples
from budwood.data.packing import split_micro
from budwood.model.evaluation import collate_for
from budwood.training.on_policy import find_maker, make_set, sets_begun
from budwood.training.progress import Progress, planned_steps


@dataclass(frozen=True)
class StepBatches:
    """An optimizer step's examples, and this process's micro-batches of them, each of at most `micro_tokens`."""

    examples: Examples
    indices: np.ndarray
    epoch: int
    micro_tokens: int
    batches: list[Batch]
    drawn: int = 0
    """Examples of `run.examples` that the plan draws with this step."""

    @classmethod
    def collate(cls, run: Run, examples: Examples, indices: np.ndarray, epoch: int, drawn: int) -> StepBatches:
        """Split among micro-batches and processes as `run.micro_tokens` says now."""
        limit = run.micro_tokens
        rows = split_micro(indices, examples.lengths, limit, run.packed, examples.groups)
        rows = rows[run.process_index :: run.processes]
        made = [collate_for(run, [examples[i] for i in row], epoch) for row in rows]
        return cls(examples, indices, epoch, limit, made, drawn)

    def again(self, run: Run) -> StepBatches:
        """The same step, split as `run.micro_tokens` says now."""
        return self.collate(run, self.examples, self.indices, self.epoch, self.drawn)


def optimizer_steps(
    run: Run, hooks: Composition, progress: Progress | None = None
) -> Iterator[tuple[StepBatches, dict[str, float]]]:
    """For each optimizer step: this process's micro-batches, and the counts of units over all processes.

    The next step's batches are collated by a thread beside the step, unless a strategy makes its examples; then the
    active set is kept in `progress`.
    """
    if find_maker(hooks) is not None:
        assert progress is not None
        for step in _steps_on_policy(run, hooks, progress):
            yield step, count_units(run, hooks, step.batches)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
        upcoming = None
        for epoch, indices in planned_steps(run, run.step):
            ready, upcoming = (
                upcoming,
                pool.submit(StepBatches.collate, run, run.examples, indices, epoch, len(indices)),
            )
            if ready is not None:
                yield _counted(run, hooks, ready)
        if upcoming is not None:
            yield _counted(run, hooks, upcoming)


def _steps_on_policy(run: Run, hooks: Composition, progress: Progress) -> Iterator[StepBatches]:
    """The optimizer steps of a run whose examples are made as it goes, a set for each step of the plan."""
    plan = planned_steps(run, sets_begun(hooks, run.step))
    while run.step < (run.steps or 0):
        drawn = 0
        if progress.active is None or progress.active.is_used_up(run.step):
            run.epoch, prompts = next(plan)
            progress.active, drawn = make_set(run, hooks, prompts), len(prompts)
        examples = progress.active.examples_of(run.step)
        try:
            step = StepBatches.collate(run, examples, np.arange(len(examples)), run.epoch, drawn)
        except ValueError as error:
            raise PluginError(f"{find_maker(hooks)}, hook next_examples: {error}.") from error
        yield step


def _counted(run: Run, hooks: Composition, collated: Future[StepBatches]) -> tuple[StepBatches, dict[str, float]]:
    """A step's micro-batches, waited for, and their counts over all processes."""
    step = collated.result()
    run.epoch = step.epoch
    if step.micro_tokens != run.micro_tokens:  # it was collated before memory ran out
        step = step.again(run)
    return step, count_units(run, hooks, step.batches)


def count_units(run: Run, hooks: Composition, batches: list[Batch]) -> dict[str, float]:
    """Sum of each unit over the step's micro-batches and all processes, in float64.

    Raises:
        PluginError: a strategy counts a unit that core or another strategy has.
    """
    counts = dict.fromkeys((*(unit for unit in UNITS if unit != "step"), "token"), 0.0)
    owners: dict[str, object] = dict.fromkeys((*UNITS, "token"), "core")
    for batch in batches:
        for unit, value in batch.counts.items():
            counts[unit] += value
        for plugin, found in hooks.collect("batch_counts", run=run, batch=batch):
            for unit, value in found.items():
                if owners.setdefault(unit, plugin) is not plugin:
                    raise PluginError(
                        f"{plugin}: batch_counts counts '{unit}', which {owners[unit]} counts: rename it."
                    )
                counts[unit] = counts.get(unit, 0.0) + float(value)
    if run.processes > 1:
        everyone: list[dict[str, float]] = [{}] * run.processes
        torch.distributed.all_gather_object(everyone, counts)
        names = dict.fromkeys(name for each in everyone for name in each)
        counts = {name: sum(each.get(name, 0.0) for each in everyone) for name in names}
    return counts
