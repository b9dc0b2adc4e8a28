"""When ranks are allocated, and how many (Zhang et al., 2023, section 3.3)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from budwood_adalora.options import AdaLoRAOptions


@dataclass(frozen=True)
class Schedule:
    """The phases of a run of `steps` optimizer steps.

    In the first `initial` steps every update has its initial rank. Then the budget falls, and ranks are allocated every
    `interval` steps, until `final` steps are left; from there on the ranks are what they are.
    """

    steps: int
    initial: int
    final: int
    interval: int

    @classmethod
    def of(cls, options: AdaLoRAOptions, steps: int) -> Schedule:
        """The phases that the options give a run of `steps` steps."""
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
        """Whether ranks are allocated after the `step`-th step (from 1), before the last time."""
        return self.initial < step < self.last and (step - self.initial) % self.interval == 0

    def budget(self, step: int, start: int, target: int) -> int:
        """Sum of the ranks after the `step`-th step, from `start` down to `target`.

        Eq. 12, read as its authors' code and PEFT read it: the cube falls from 1 at `initial` to 0 at `last`.
        """
        if step <= self.initial:
            return start
        if step >= self.last:
            return target
        left = 1 - (step - self.initial) / (self.last - self.initial)
        return int((start - target) * left**3 + target)


def smallest_steps(options: AdaLoRAOptions) -> int:
    """The smallest number of steps with room for the phases that the options ask for."""
    phases = (options.initial_phase, options.final_phase)
    fixed, share = sum(int(p) for p in phases if p >= 1), sum(p for p in phases if p < 1)
    too_few = int((options.interval + fixed - 1) / (1 - share))  # rounding gives a run one step at most
    return next(n for n in itertools.count(max(too_few, 1)) if Schedule.of(options, n).fits)


def _count(phase: float, steps: int) -> int:
    return int(phase) if phase >= 1 else round(phase * steps)
