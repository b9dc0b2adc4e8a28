"""An average of the trained parameters over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Update = Callable[[Tensor, Tensor, int], None]
"""update(shadow, parameter, updates): move `shadow` (fp32) in place towards `parameter`, a tensor of the same shape and
device; `updates` ≥ 1 is the number of steps averaged so far. Called without gradients."""


class Average:
    """A shadow of each trained parameter, updated after optimizer steps; created by `Run.average_with`.

    Attributes:
        update: updates one shadow.
        start: the first step to average, from 1; its parameters initialise the shadows.
        every: average every `every`-th step from `start` on.
        updates: number of steps averaged so far; while it is 0, the shadows are not valid.
        shadows: fp32 tensors by parameter, on the parameter's device.
    """

    def __init__(self, update: Update, start: int = 1, every: int = 1) -> None:
        self.update, self.start, self.every = update, start, every
        self.updates = 0
        self.shadows: dict[nn.Parameter, Tensor] = {}

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """Allocate the shadows, so that insufficient memory is noticed before the first step."""
        self.shadows = {parameter: parameter.detach().float().clone() for parameter in parameters}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Add the parameters after `step` completed optimizer steps to the average, if that step is averaged."""
        if step < self.start or (step - self.start) % self.every:
            return
        for parameter, shadow in self.shadows.items():
            if self.updates:
                self.update(shadow, parameter.detach(), self.updates)
            else:
                shadow.copy_(parameter)
        self.updates += 1

    def replace(self, old: nn.Parameter, new: nn.Parameter, index: Any) -> None:
        """Replace the shadow of `old` with its slice `index`, as the shadow of `new`."""
        if old in self.shadows:
            self.shadows = {
                new if parameter is old else parameter: shadow[index].clone() if parameter is old else shadow
                for parameter, shadow in self.shadows.items()
            }
