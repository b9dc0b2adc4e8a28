"""The averaged parameters of a run: put in place for an evaluation or for good, and in a checkpoint.

What is evaluated, kept as the best, exported and reported is the average if the run has one; training goes on with the
parameters as the optimizer left them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from budwood.contract.types import Run
from budwood.training.durability.changes import named_parameters


@torch.no_grad()
def put_average(run: Run) -> list[Tensor]:
    """Copy the average into the parameters; return their own values, [] if there is no average yet."""
    average = run.average
    if average is None or not average.updates:
        return []
    own = [parameter.detach().clone() for parameter in run.trainable]
    for parameter in run.trainable:
        parameter.copy_(average.shadows[parameter])
    return own


@torch.no_grad()
def put_back(run: Run, own: list[Tensor]) -> None:
    """Copy what `put_average` returned into the parameters again, bit for bit."""
    for parameter, value in zip(run.trainable, own, strict=True) if own else ():
        parameter.copy_(value)


def average_state(run: Run) -> dict[str, Any] | None:
    """Give what a checkpoint holds of the average; None for a run without one."""
    if run.average is None:
        return None
    shadows = {name: run.average.shadows[parameter] for name, parameter in named_parameters(run).items()}
    return {"updates": run.average.updates, "shadows": shadows}


def load_average_state(run: Run, state: dict[str, Any] | None) -> None:
    """Take back what `average_state` gave, once the parameters have their shapes; an average that is new begins anew.

    Raises:
        KeyError, ValueError: it is of other parameters.
    """
    if run.average is None or state is None:
        return
    for name, parameter in named_parameters(run).items():
        shadow, saved = run.average.shadows[parameter], state["shadows"][name]
        if shadow.shape != saved.shape:
            raise ValueError(f"the average of '{name}' is {list(saved.shape)}, not {list(shadow.shape)}")
        shadow.copy_(saved)
    run.average.updates = int(state["updates"])
