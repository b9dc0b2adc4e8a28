"""An average of the trained parameters over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Update = Callable[[Tensor, Tensor, int], None]
"""update(shadow, parameter, updates): move `shadow` (fp32) in place towards `parameter`, a tensor of its shape on its
device; `updates` ≥ 1 counts how many steps the shadow averages so far. Called without gradients."""


class Average:
    """A shadow of each trained parameter, moved after optimizer steps. Core holds it; `Run.average_with` asks for one.

    Attributes:
        update: moves one shadow.
        start: the first step that is averaged, from 1: its parameters are what the shadows begin as.
        every: of the steps from `start` on, each `every`-th is averaged.
        updates: how many steps are averaged so far; 0: the shadows mean nothing yet.
        shadows: fp32, on the parameter's device, by parameter.
    """

    def __init__(self, update: Update, start: int = 1, every: int = 1) -> None:
        self.update, self.start, self.every = update, start, every
        self.updates = 0
        self.shadows: dict[nn.Parameter, Tensor] = {}

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the shadows, so that memory that does not hold them is missed before the first step."""
        self.shadows = {parameter: parameter.detach().float().clone() for parameter in parameters}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take the parameters after `step` completed optimizer steps into the average, if it is one of its steps."""
        if step < self.start or (step - self.start) % self.every:
            return
        for parameter, shadow in self.shadows.items():
            if self.updates:
                self.update(shadow, parameter.detach(), self.updates)
            else:
                shadow.copy_(parameter)
        self.updates += 1

    def replace(self, old: nn.Parameter, new: nn.Parameter, index: Any) -> None:
        """Keep `index` of the shadow of `old` as that of `new`."""
        if old in self.shadows:
            self.shadows = {
                new if parameter is old else parameter: shadow[index].clone() if parameter is old else shadow
                for parameter, shadow in self.shadows.items()
            }
