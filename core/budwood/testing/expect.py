"""Assertions shared by several checks: equal parameters, an unchanged model, a successful run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from budwood.testing.bench import LEARNING_RATE, Bench, PromiseBroken, Result
from budwood.testing.probe import Probe, distance

EXACT = 1e-5
"""Largest difference of a parameter between runs that split a step differently, in fp32 and without dropout."""
ROUNDING = 2.0**-24
"""Relative error of a rounding to fp32."""


def expect_equal(
    promise: str, whole: Result, other: dict[str, Tensor], label: str, bench: Bench, probe: Probe | None = None
) -> None:
    """Check that the parameters of another run equal those of `whole`, within `EXACT`.

    Adam divides an element's gradient by its size, and with it the rounding of the sums that have made it. Where a
    gradient of an element was so small, in both runs, that the rounding of the largest gradient of all makes more of a
    step than `EXACT`, that is allowed. An element whose gradient is smaller than the rounding is left out: it may be
    zero in truth, as those of queries if there is one position.

    Args:
        probe: of the other run, if it is known.

    Raises:
        PromiseBroken: they differ; the message says where.
    """
    probes = [whole.probe, *([probe] if probe is not None else [])]
    found = []
    for name in {**whole.parameters, **other}:
        one, two = whole.parameters.get(name), other.get(name)
        if one is None or two is None or one.shape != two.shape:
            found.append((math.inf, math.inf, EXACT, name))
        elif one.numel():
            bounds = torch.stack([_allowed(each, name, one) for each in probes]).amin(0).view(-1)
            gaps = (one.double() - two.double()).abs().view(-1)
            worst = int((gaps - bounds).argmax())
            found.append((float((gaps - bounds)[worst]), float(gaps[worst]), float(bounds[worst]), name))
    failed = [each for each in found if not each[0] <= 0]
    if failed:
        _, gap, bound, name = max(failed)
        raise PromiseBroken(
            f"{promise}: {label} differ by {gap:.3g} in {name} after {bench.spec.steps} steps in fp32 "
            f"(at most {bound:.3g} allowed). Return values per label or example, and draw noise "
            "from step.generator(self, example)."
        )


def _allowed(probe: Probe, name: str, like: Tensor) -> Tensor:
    """Return the largest allowed difference of each element of a parameter, float64, in the shape of `like`."""
    most = max((size or 0.0 for size in probe.largest.values()), default=0.0)
    sizes = probe.smallest.get(name)
    if sizes is None or sizes.shape != like.shape:  # never trained, or pruned after the last gradient
        sizes = torch.full_like(like, probe.largest.get(name) or math.inf)
    shares = ROUNDING * most / sizes.double().cpu()
    return (LEARNING_RATE * shares).clamp(min=EXACT).masked_fill(shares > 1, math.inf)


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
