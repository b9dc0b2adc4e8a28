"""The size of micro-batches where the recipe leaves it open: what fits, and what is worth having."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from budwood.contract.types import Run
from budwood.recipe.schema import MICRO_TOKENS
from budwood.training.on_policy import find_generator
from budwood.training.progress import planned_steps

STEPS = 200
"""Optimizer steps that are looked at."""
USEFUL = 16_384
"""Tokens beyond which a GPU gains nothing: dequantising a 4-bit base then takes about 1 % of a micro-batch's time."""
ROUND = 64
"""Sizes are multiples of this."""


def largest_group(lengths: np.ndarray, groups: np.ndarray | None) -> int:
    """Return the tokens of the largest group of examples, which is never split; 1 without examples.

    Args:
        lengths: [n] of the examples.
        groups: [n] group of each example; None: each is a group.
    """
    sizes = lengths if groups is None else np.bincount(groups, weights=lengths)
    return max(int(sizes.max()), 1) if len(sizes) else 1


def wanted(run: Run, kind: str) -> int:
    """Return the size to take if the memory is ample.

    A CPU is hardly faster with more than the usual size. A GPU is, up to a whole optimizer step.

    Args:
        run: with its data.
        kind: cpu or cuda.
    """
    largest = largest_group(run.examples.lengths, run.examples.groups)
    if kind == "cpu" or find_generator(run.hooks) is not None:
        return max(largest, run.recipe.micro_tokens)
    steps = [int(run.examples.lengths[indices].sum()) for _, indices in islice(planned_steps(run), STEPS)]
    return max(largest, min(USEFUL, max(MICRO_TOKENS, _rounded(max(steps, default=1)))))


def shared_out(run: Run, size: int, processes: int | None = None) -> int:
    """Return at most `size`, such that every process has a micro-batch in most optimizer steps.

    Args:
        processes: of the run, if it is planned for other ones than it has.
    """
    processes = processes or run.processes
    if processes == 1 or find_generator(run.hooks) is not None:
        return size
    steps = [int(run.examples.lengths[indices].sum()) for _, indices in islice(planned_steps(run), STEPS)]
    share = _rounded(int(np.mean(steps or [size])) // processes)
    return min(size, max(share, largest_group(run.examples.lengths, run.examples.groups)))


def settle(run: Run, size: int) -> None:
    """Set the size of a run's micro-batches, in its recipe too, which is recorded."""
    run.micro_tokens = run.eval_tokens = run.reference_tokens = size
    run.recipe = run.recipe.with_train(run.recipe.train.model_copy(update={"micro_tokens": size}))


def settle_as_before(run: Run, setting: dict[str, Any]) -> None:
    """Set the size that a checkpoint's run chose, if the recipe leaves it open.

    Args:
        setting: recorded in the checkpoint.
    """
    before = ((setting.get("recipe") or {}).get("train") or {}).get("micro_tokens")
    if run.recipe.train.micro_tokens is None and isinstance(before, int):
        settle(run, before)


def _rounded(size: int) -> int:
    return -(-size // ROUND) * ROUND
