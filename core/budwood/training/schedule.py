"""The learning rate of each step, and what is said about a warm-up that takes up the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from budwood.errors import plural

if TYPE_CHECKING:
    import torch

    from budwood.recipe.sections import TrainSection


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, steps: int) -> LambdaLR:
    """Return linear warm-up, then cosine, linear or constant, over a run of `steps`.

    Step n of w warm-up steps, counted from 1, has n / w of the peak. From the peak on, a cosine or line leads to zero
    one step after the last one; without a warm-up these are the schedules of transformers.
    """
    warmup = warmup_steps(train, steps)
    peak = max(warmup - 1, 0)  # the step with the full rate, counted from 0

    def factor(step: int) -> float:
        if step < peak:
            return (step + 1) / warmup
        done = min((step - peak) / max(steps - peak, 1), 1.0)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[train.schedule]

    return LambdaLR(optimizer, factor)


def warmup_steps(train: Any, steps: int) -> int:
    """Return the number of warm-up steps of a recipe's `train` section."""
    return int(train.warmup) if train.warmup >= 1 else round(train.warmup * steps)


def warmup_note(train: TrainSection, steps: int) -> str:
    """Return a note about a warm-up that is as long as the run, or longer; empty if it is shorter."""
    warmup = warmup_steps(train, steps)
    if warmup < steps:
        return ""
    ends = "reaches its peak only at the last step" if warmup == steps else f"ends at {steps / warmup:.0%} of its peak"
    length = "as long as" if warmup == steps else "longer than"
    steps_long = plural(warmup, "step")
    return f"note: the warm-up ({steps_long}) is {length} the run: the learning rate {ends}; lower train.warmup"
