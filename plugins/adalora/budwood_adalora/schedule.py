"""The schedule of the rank budget (Zhang et al., 2023, section 3.3)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from budwood_adalora.options import AdaLoRAOptions


@dataclass(frozen=True)
class Schedule:
    """The phases of a run of `steps` optimizer steps.

    In the first `initial` steps every update has its initial rank. Then the budget decreases, and ranks are allocated
    every `interval` steps. In the last `final` steps the ranks are fixed.
    """

    steps: int
    initial: int
    final: int
    interval: int

    @classmethod
    def of(cls, options: AdaLoRAOptions, steps: int) -> Schedule:
        """Return the schedule of a run of `steps` steps with these options."""
        initial, final = _count(options.initial_phase, steps), max(_count(options.final_phase, steps), 1)
        return cls(steps, initial, final, options.interval)

    @property
    def last(self) -> int:
        """The step after which the ranks are final."""
        return self.steps - self.final

    @property
    def fits(self) -> bool:
        """Whether the run has room for one interval between its phases."""
        return self.last - self.initial >= self.interval

    def allocates(self, step: int) -> bool:
        """Whether ranks are allocated after the `step`-th step (from 1), except for the final allocation."""
        return self.initial < step < self.last and (step - self.initial) % self.interval == 0

    def budget(self, step: int, start: int, target: int) -> int:
        """Return the allowed sum of ranks after the `step`-th step, from `start` down to `target`.

        Eq. 12, as interpreted by the authors' code and PEFT: the cubic factor falls from 1 at `initial` to 0 at `last`.
        """
        if step <= self.initial:
            return start
        if step >= self.last:
            return target
        left = 1 - (step - self.initial) / (self.last - self.initial)
        return int((start - target) * left**3 + target)


def smallest_steps(options: AdaLoRAOptions) -> int:
    """Return the smallest number of steps with room for the phases in the options."""
    phases = (options.initial_phase, options.final_phase)
    fixed, share = sum(int(p) for p in phases if p >= 1), sum(p for p in phases if p < 1)
    too_few = int((options.interval + fixed - 1) / (1 - share))  # rounding changes it by one step at most
    return next(n for n in itertools.count(max(too_few, 1)) if Schedule.of(options, n).fits)


def _count(phase: float, steps: int) -> int:
    return int(phase) if phase >= 1 else round(phase * steps)
