"""Repeats a function with the random numbers that it drew the first time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Draws:
    """The state of torch's generators before a function, kept only if the function draws from them.

    Enter `first` around the function, and `again` around each repetition; `again` leaves the generators as they were.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: list[torch.Tensor] | None = None
        self.first, self.again = _First(self), _Again(self)

    def states(self) -> list[torch.Tensor]:
        """Return the states of the CPU's generator and of the device's; none in a plan, which draws nothing."""
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return []
        cuda = self.device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if cuda else [])]

    def restore(self, states: list[torch.Tensor]) -> None:
        """Set the generators to states that `states` returned."""
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)


class _First:
    def __init__(self, draws: Draws) -> None:
        self.draws, self.before = draws, []  # type: ignore[var-annotated]

    def __enter__(self) -> None:
        self.before = self.draws.states()

    def __exit__(self, *error: Any) -> None:
        before, self.before = self.before, []
        if not all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(before, self.draws.states(), strict=True)):
            self.draws.kept = before


class _Again:
    def __init__(self, draws: Draws) -> None:
        self.draws, self.outside = draws, None

    def __enter__(self) -> None:
        if self.draws.kept is not None:
            self.outside = self.draws.states()  # type: ignore[assignment]
            self.draws.restore(self.draws.kept)

    def __exit__(self, *error: Any) -> None:
        if self.outside is not None:
            self.draws.restore(self.outside)
            self.outside = None
