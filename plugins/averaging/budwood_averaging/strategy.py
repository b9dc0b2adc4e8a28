"""EMA and SWA as strategies: each says how a shadow moves and when; core does the rest."""

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
    """An exponential moving average of what trains is evaluated and saved (Polyak & Juditsky, 1992)."""

    Options = EMAOptions
    slots = ("average",)

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.average_with(self.update)
        return model

    def update(self, shadow: Tensor, parameter: Tensor, updates: int) -> None:
        """shadow ← d · shadow + (1 - d) · parameter, d = min(decay, (1 + t) / (10 + t)), t = updates.

        The warm-up is that of TensorFlow's ExponentialMovingAverage(num_updates): the mean age of what is averaged is
        at most about a tenth of the steps so far.
        """
        shadow.lerp_(parameter, 1 - min(self.options.decay, (1 + updates) / (10 + updates)))


class SWAOptions(Options):
    """Options of `swa`."""

    start: float = Field(0.75, ge=0, description="the first step that is averaged: below 1 a share of the run, else it")
    every: int = Field(1, ge=1, description="of the steps from there on, each so many-th is averaged")

    @field_validator("start")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"from 1 on it is a step and must be whole (got {value})")
        return value


class SWA(Strategy):
    """The mean of what trains over the last part of the run is evaluated and saved (Izmailov et al., 2018)."""

    Options = SWAOptions
    slots = ("average",)

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.steps is not None and (start := self._start(plan.steps)) > plan.steps:
            plan.problem(self, f"start: averaging would begin at step {start}, and the run has {plan.steps}: lower it.")

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.average_with(self.update, self._start(run.steps or 1), self.options.every)
        return model

    def update(self, shadow: Tensor, parameter: Tensor, updates: int) -> None:
        """shadow ← shadow + (parameter - shadow) / (n + 1), n = updates: the mean of all, each with the same weight."""
        shadow.lerp_(parameter, 1 / (updates + 1))

    def _start(self, steps: int) -> int:
        start = self.options.start
        return int(start) if start >= 1 else max(round(start * steps), 1)
