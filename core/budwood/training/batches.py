"""The micro-batches of each optimizer step, and the counts that normalise its loss terms."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.contract.registry import Composition
from budwood.contract.types import UNITS, Run
from budwood.data.examples import Examples
from budwood.data.packing import split_micro
from budwood.model.evaluation import collate_for, made_ahead
from budwood.training.on_policy import find_generator, generate_set, sets_started
from budwood.training.progress import Progress, planned_steps


@dataclass(frozen=True)
class StepBatches:
    """An optimizer step's examples, and this process's micro-batches of at most `micro_tokens` tokens."""

    examples: Examples
    indices: np.ndarray
    epoch: int
    micro_tokens: int
    batches: list[Batch]
    drawn: int = 0
    """Number of examples of `run.examples` that this step draws."""
    idle: Batch | None = None
    """With a sharded base, examples without labels, where other processes have one micro-batch more than this one."""

    @classmethod
    def collate(cls, run: Run, examples: Examples, indices: np.ndarray, epoch: int, drawn: int) -> StepBatches:
        """Split the examples into micro-batches of at most `run.micro_tokens`, and take this process's part."""
        limit = run.micro_tokens
        splits = split_micro(indices, examples.lengths, limit, run.packed, examples.groups, run.processes)
        own = run.world.share(splits)
        batches = [collate_for(run, [examples[i] for i in split], epoch) for split in own]
        if run.device.type == "cuda":  # here, since a thread collates beside the step before
            batches = [batch.pinned() for batch in batches]
        idle = None
        if run.sharded and len(own) * run.processes < len(splits):
            idle = collate_for(run, [examples[i].without_labels() for i in splits[0]], epoch)
        return cls(examples, indices, epoch, limit, batches, drawn, idle)

    def split_again(self, run: Run) -> StepBatches:
        """Return the same step, split by the current `run.micro_tokens`."""
        return self.collate(run, self.examples, self.indices, self.epoch, self.drawn)


def optimizer_steps(
    run: Run, hooks: Composition, progress: Progress | None = None
) -> Iterator[tuple[StepBatches, dict[str, float]]]:
    """Yield, for each optimizer step, this process's micro-batches and the counts of units over all processes.

    A thread collates the next step's batches during the current step. If a strategy generates the examples, no thread
    runs, and `progress` holds the active set.
    """
    if find_generator(hooks) is not None:
        assert progress is not None
        for step in _steps_on_policy(run, hooks, progress):
            yield step, count_units(run, hooks, step.batches)
        return

    def collate(planned: tuple[int, np.ndarray]) -> StepBatches:
        epoch, indices = planned
        return StepBatches.collate(run, run.examples, indices, epoch, len(indices))

    for collated in made_ahead(collate, planned_steps(run, run.step)):
        yield _counted(run, hooks, collated)


def _steps_on_policy(run: Run, hooks: Composition, progress: Progress) -> Iterator[StepBatches]:
    """Yield the optimizer steps of a run whose examples are generated during training, one set per planned step."""
    plan = planned_steps(run, sets_started(hooks, run.step))
    while run.step < (run.steps or 0):
        drawn = 0
        if progress.active is None or progress.active.is_used_up(run.step):
            run.epoch, prompts = next(plan)
            progress.active, drawn = generate_set(run, hooks, prompts), len(prompts)
        examples = progress.active.examples_of(run.step)
        try:
            step = StepBatches.collate(run, examples, np.arange(len(examples)), run.epoch, drawn)
        except ValueError as error:
            raise PluginError(f"{find_generator(hooks)}, hook next_examples: {error}.") from error
        yield step


def _counted(run: Run, hooks: Composition, collated: Future[StepBatches]) -> tuple[StepBatches, dict[str, float]]:
    """Wait for a step's micro-batches; returns them and their counts over all processes."""
    step = collated.result()
    run.epoch = step.epoch
    if step.micro_tokens != run.micro_tokens:  # memory ran out after the step was collated
        step = step.split_again(run)
    return step, count_units(run, hooks, step.batches)


def count_units(run: Run, hooks: Composition, batches: list[Batch]) -> dict[str, float]:
    """Sum each unit over the step's micro-batches and all processes, in float64.

    Raises:
        PluginError: a strategy counts a unit that core or another strategy already counts.
    """
    counts = dict.fromkeys((*(unit for unit in UNITS if unit != "step"), "token"), 0.0)
    owners: dict[str, object] = dict.fromkeys((*UNITS, "token"), "core")
    for batch in batches:
        for unit, value in batch.counts.items():
            counts[unit] += value
        for plugin, plugin_counts in hooks.collect("batch_counts", run=run, batch=batch):
            for unit, value in plugin_counts.items():
                if owners.setdefault(unit, plugin) is not plugin:
                    raise PluginError(
                        f"{plugin}: batch_counts counts '{unit}', which {owners[unit]} already counts: rename it."
                    )
                counts[unit] = counts.get(unit, 0.0) + float(value)
    return run.world.sum_of(counts)
