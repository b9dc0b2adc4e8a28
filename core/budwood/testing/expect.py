"""Assertions shared by several checks: equal parameters, an unchanged model, a successful run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from budwood.testing.bench import LEARNING_RATE, Bench, PromiseBroken, Result
from budwood.testing.probe import distance, farthest

EXACT = 1e-5
"""Largest difference of a parameter between runs that split a step differently, in fp32 and without dropout."""
ROUNDING = 2.0**-24
"""Relative error of a rounding to fp32."""


def expect_equal(
    promise: str,
    whole: Result,
    other: dict[str, Tensor],
    label: str,
    bench: Bench,
    largest: dict[str, float | None] | None = None,
) -> None:
    """Check that the parameters of another run equal those of `whole`, within `EXACT`.

    A parameter is left out if its gradients are smaller, in both runs, than a rounding of the largest gradient of all:
    they may be zero but for rounding, as those of queries if there is one position, and Adam makes whole steps of it.
    For gradients that are not much larger, Adam makes parts of a step of it, which are allowed too.

    Args:
        largest: the largest gradient of each parameter in the other run, if it is known.

    Raises:
        PromiseBroken: they differ; the message says where.
    """
    runs = [whole.probe.largest, *([largest] if largest is not None else [])]
    zero = set.intersection(*map(_rounded_away, runs))
    ours, theirs = ({k: v for k, v in each.items() if k not in zero} for each in (whole.parameters, other))
    allowed = {name: max(EXACT, min(_of_rounding(sizes, name) for sizes in runs)) for name in ours}
    name, gap = farthest(ours, theirs, allowed)
    if not gap <= allowed.get(name, EXACT):
        raise PromiseBroken(
            f"{promise}: {label} differ by {gap:.3g} in {name} after {bench.spec.steps} steps in fp32 "
            f"(at most {allowed.get(name, EXACT):.3g} allowed). Return values per label or example, and draw noise "
            "from step.generator(self, example)."
        )


def _rounded_away(largest: dict[str, float | None]) -> set[str]:
    """Return the parameters whose gradients vanish beside the largest of all."""
    most = max((size or 0.0 for size in largest.values()), default=0.0)
    return {name for name, size in largest.items() if size is not None and 0 < size < ROUNDING * most}


def _of_rounding(largest: dict[str, float | None], name: str) -> float:
    """Return the part of a step that Adam makes of a rounding of the largest gradient, in the kit's learning rate."""
    size = largest.get(name) or 0.0
    most = max((each or 0.0 for each in largest.values()), default=0.0)
    return LEARNING_RATE * ROUNDING * most / size if size else 0.0


def expect_state(promise: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Check that the state of the model is unchanged.

    Raises:
        PromiseBroken: it changed; the message lists the changes.
    """
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if changed:
        details = "; ".join(
            f"{key}: {_short(before.get(key))} before, {_short(after.get(key))} after" for key in changed[:3]
        )
        raise PromiseBroken(f"{promise}, {len(changed)} properties of the model changed: {details}.")


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return str(len(value))
    return (
        "absent"
        if value is None
        else "a different one"
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
    )


def expect_trained(promise: str, result: Result) -> None:
    """Check that parameters and metrics of a run are finite and that it changed the model.

    Raises:
        PromiseBroken: a value is not finite, or no logit changed.
    """
    parameters = [name for name, tensor in result.parameters.items() if not bool(torch.isfinite(tensor).all())]
    metrics = [str(name) for name, value in result.run.metrics.items() if not math.isfinite(float(value))]
    if parameters or metrics:
        raise PromiseBroken(f"{promise}: not finite: {', '.join([*parameters, *metrics][:5])}.")
    if not distance(result.logits, result.probe.base_logits):
        raise PromiseBroken(f"{promise}: after training all logits are those of the base.")
