"""What several promises come down to: equal parameters, a model as it was, a sound run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from budwood.testing.bench import Bench, PromiseBroken, Result
from budwood.testing.probe import distance, farthest

EXACT = 1e-5
"""Largest difference of a parameter between two runs that split a step otherwise, in fp32 and without dropout."""


def expect_equal(promise: str, whole: Result, other: dict[str, Tensor], what: str, bench: Bench) -> None:
    """Check that another run gives the parameters of `whole`, within `EXACT`.

    Raises:
        PromiseBroken: it is not so.
    """
    name, gap = farthest(whole.parameters, other)
    if not gap <= EXACT:
        raise PromiseBroken(
            f"{promise}: {what} differ by {gap:.3g} in {name} after {bench.spec.steps} steps in fp32 "
            f"(at most {EXACT:g} is due). Values go by label or example, and noise by step.generator(self, example)."
        )


def expect_state(promise: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Check that what is on the model is as it was.

    Raises:
        PromiseBroken: it is not; with what changed.
    """
    changed = [what for what in {**before, **after} if before.get(what) != after.get(what)]
    if changed:
        named = "; ".join(
            f"{what}: {_short(before.get(what))} before, {_short(after.get(what))} after" for what in changed[:3]
        )
        raise PromiseBroken(f"{promise}, {len(changed)} things on the model are not as before: {named}.")


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return str(len(value))
    return (
        "absent"
        if value is None
        else "another"
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
    )


def expect_sound(promise: str, result: Result) -> None:
    """Check that a run's numbers are finite and that it changed the model.

    Raises:
        PromiseBroken: it is not so.
    """
    bad = [name for name, tensor in result.parameters.items() if not bool(torch.isfinite(tensor).all())]
    numbers = {name: value for name, value in result.run.metrics.items() if not math.isfinite(float(value))}
    if bad or numbers:
        raise PromiseBroken(f"{promise}: not finite: {', '.join([*bad, *map(str, numbers)][:5])}.")
    moved = distance(result.logits, result.probe.base_logits)
    if not moved:
        raise PromiseBroken(f"{promise}: after training every logit is the base's own.")
