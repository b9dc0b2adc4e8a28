"""EMA and SWA as strategies: each defines the update of a shadow parameter and its steps; core does the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from budwood import Options, Strategy, hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Plan, Run


class EMAOptions(Options):
    """Options of `ema`."""

    decay: float = Field(0.999, gt=0, lt=1, description="weight of the past in each step, once the warm-up is over")


class EMA(Strategy):
    """Evaluates and saves an exponential moving average of the parameters (Polyak & Juditsky, 1992)."""

    Options = EMAOptions
    slots = ("average",)

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.average_with(self.update)
        return model

    def update(self, shadow: Tensor, parameter: Tensor, updates: int) -> None:
        """Update in place: shadow ← d · shadow + (1 - d) · parameter, d = min(decay, (1 + t) / (10 + t)), t = updates.

        The warm-up is that of TensorFlow's ExponentialMovingAverage(num_updates): the mean age of the averaged steps is
        at most about a tenth of the steps so far.
        """
        shadow.lerp_(parameter, 1 - min(self.options.decay, (1 + updates) / (10 + updates)))


class SWAOptions(Options):
    """Options of `swa`."""

    start: float = Field(0.75, ge=0, description="first averaged step: below 1 a share of the run, otherwise a step")
    every: int = Field(1, ge=1, description="interval between averaged steps")

    @field_validator("start")
    @classmethod
    def _integer_step(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"values of 1 and above are steps and must be integers (got {value})")
        return value


class SWA(Strategy):
    """Evaluates and saves the mean of the parameters over the last part of the run (Izmailov et al., 2018)."""

    Options = SWAOptions
    slots = ("average",)

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.steps is not None and (start := self._start(plan.steps)) > plan.steps:
            plan.problem(self, f"start: averaging would begin at step {start} of {plan.steps}: lower it.")

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.average_with(self.update, self._start(run.steps or 1), self.options.every)
        return model

    def update(self, shadow: Tensor, parameter: Tensor, updates: int) -> None:
        """Update in place: shadow ← shadow + (parameter - shadow) / (n + 1), n = updates: the unweighted mean."""
        shadow.lerp_(parameter, 1 / (updates + 1))

    def _start(self, steps: int) -> int:
        start = self.options.start
        return int(start) if start >= 1 else max(round(start * steps), 1)
