"""What a run computes outside of its steps: evaluations, and the generation of answers, as passes without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from budwood.contract.types import Run
from budwood.data.packing import split_micro
from budwood.model.exact_match import LIMIT, MORE
from budwood.model.generate import BATCH_TOKENS
from budwood.planning.cost import Cost, cost_line, cost_of
from budwood.planning.options import Device
from budwood.planning.rehearsal import Rehearsal, micro_of, sizes_of
from budwood.planning.trace import Peak, without_collection
from budwood.training.on_policy import find_generator, updates_of
from budwood.training.sampling import TIMES


@dataclass(frozen=True)
class Passes:
    """What a run computes outside of its steps.

    Attributes:
        evaluation, generation: the cost of all evaluations, and of all generation of answers.
        evaluations: their number.
        peak: that of an evaluation, without the generation of answers; None: the run has none.
        cached_tokens: tokens whose keys and values a batch of answers holds at most.
    """

    evaluation: Cost = Cost()
    generation: Cost = Cost()
    evaluations: int = 0
    peak: Peak | None = None
    cached_tokens: int = 0


def rehearse_passes(rehearsal: Rehearsal, device: Device, steps: int) -> Passes:
    """Rehearse what a run of `steps` optimizer steps computes outside of them.

    An evaluation takes the forward passes of the task's own, without what strategies add. A decoding step costs as much
    as a pass over one token per answer; its attention to earlier tokens is left out.
    """
    run, every = rehearsal.run, rehearsal.run.recipe.train.eval_every
    maker = find_generator(run.hooks)
    evaluations = 0
    if run.eval_examples is not None and len(run.eval_examples):
        evaluations = 2 + ((steps - 1) // every if every else 0)
    if not evaluations and maker is None:
        return Passes()
    examples = run.eval_examples if evaluations and run.eval_examples is not None else rehearsal.examples
    lengths, labels = sizes_of(run, examples)
    groups = getattr(examples, "groups", None)
    size, processes = run.eval_tokens or run.micro_tokens, rehearsal.processes
    split = split_micro(range(len(lengths)), lengths, size, run.packed, groups, processes)
    micros = [micro_of(run, lengths, labels, members) for members in split]
    shortest = int(np.argmin(lengths))
    alone = [shortest] if groups is None else np.flatnonzero(groups == groups[shortest]).tolist()
    largest, least = max(micros, key=lambda micro: micro.cells), micro_of(run, lengths, labels, alone)
    with without_collection():
        peak = rehearsal.trace.peak(rehearsal.evaluate(examples, largest))
    points = [(largest.cells, cost_of(rehearsal.trace.operations, device))]
    if least.cells < 0.9 * largest.cells:
        rehearsal.evaluate(examples, least)
        points.append((least.cells, cost_of(rehearsal.trace.operations, device)))

    line = cost_line(points, rehearsal.trace.operations, device)

    def at(cells: float) -> Cost:
        """Return the cost of a pass; of one that is smaller than the smallest rehearsed, that of the smallest."""
        return line(max(cells, least.cells)).with_traffic(rehearsal.gathering.received, device)

    evaluation, generation, cached = Cost(), Cost(), 0
    for micro in micros if evaluations else ():
        evaluation = evaluation.plus(at(micro.cells), evaluations * rehearsal.own(len(micros)) / len(micros))
    if maker is not None:
        new, updates = int(rehearsal.label_counts.max()), updates_of(run.hooks)
        prompt, count = int(rehearsal.lengths.max()) - new, len(rehearsal.examples) * updates
        each, cached = _generation(at, rehearsal.own(count), prompt, new, TIMES * run.micro_tokens)
        generation = each.times(-(-steps // updates))
    elif evaluations and (answers := _exact_match(run)) is not None:
        each, cached = _generation(at, rehearsal.own(answers[0]), *answers[1:], BATCH_TOKENS)
        generation = each.times(evaluations)
    return Passes(evaluation, generation, evaluations, peak if evaluations else None, cached)


def _exact_match(run: Run) -> tuple[int, int, int] | None:
    """Return the number of prompts that an evaluation answers, the longest prompt, and the most tokens of an answer.

    None: it answers none; see `exact_match`.
    """
    examples, limit = run.eval_examples, run.recipe.train.eval_generate
    if examples is None or not limit or not run.model.can_generate():
        return None
    if not (examples.format == "prompt-completion" or examples.rendered) or examples.label_counts.mean() > LIMIT:
        return None
    prompts = examples.lengths - examples.label_counts
    return min(limit, len(examples)), int(prompts.max()), int(examples.label_counts.max()) + MORE


def _generation(
    at: Callable[[float], Cost], count: int, prompt: int, new: int, batch_tokens: int
) -> tuple[Cost, int]:  # fmt: skip
    """Return the cost of answering `count` prompts in batches of at most `batch_tokens`, and a batch's tokens."""
    rows = max(min(batch_tokens // max(prompt + new, 1), count), 1)
    batches = -(-count // rows)
    return at(rows * prompt).times(batches).plus(at(rows), batches * new), rows * (prompt + new)


__all__ = ["Passes", "rehearse_passes"]
