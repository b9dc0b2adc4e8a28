"""A run's averaged parameters: swapped in for an evaluation or for the export, and saved in checkpoints.

If a run averages, its average is evaluated, kept as the best, exported and reported. Training continues with the
parameters that the optimizer left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from budwood.contract.types import Run
from budwood.training.durability.changes import named_parameters


@torch.no_grad()
def put_average(run: Run) -> list[Tensor]:
    """Copy the average into the parameters; return their previous values, [] if there is no average yet."""
    average = run.average
    if average is None or not average.updates:
        return []
    previous = [parameter.detach().clone() for parameter in run.trainable]
    for parameter in run.trainable:
        parameter.copy_(average.shadows[parameter])
    return previous


@torch.no_grad()
def put_back(run: Run, previous: list[Tensor]) -> None:
    """Restore the values that `put_average` returned, bitwise identical."""
    for parameter, value in zip(run.trainable, previous, strict=True) if previous else ():
        parameter.copy_(value)


def average_state(run: Run) -> dict[str, Any] | None:
    """Return the average's state for a checkpoint; None for a run without an average."""
    if run.average is None:
        return None
    shadows = {name: run.average.shadows[parameter] for name, parameter in named_parameters(run).items()}
    return {"updates": run.average.updates, "shadows": shadows}


def load_average_state(run: Run, state: dict[str, Any] | None) -> None:
    """Restore `average_state`'s result, after the parameters have their shapes; without a state it starts fresh.

    Raises:
        KeyError, ValueError: the state is that of other parameters.
    """
    if run.average is None or state is None:
        return
    for name, parameter in named_parameters(run).items():
        shadow, saved = run.average.shadows[parameter], state["shadows"][name]
        if shadow.shape != saved.shape:
            raise ValueError(f"the average of '{name}' is {list(saved.shape)}, not {list(shadow.shape)}")
        shadow.copy_(saved)
    run.average.updates = int(state["updates"])
