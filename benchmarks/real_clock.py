"""The strategy that reads the clock of `benchmarks.real_arms` in Budwood's arm: a module of its own, so that the other
arms do not import Budwood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from budwood import Strategy, hookimpl

if TYPE_CHECKING:
    from benchmarks.real_arms import Clock
    from budwood import Event, Run


class ClockStrategy(Strategy):
    """Reads the clock before the first step and after each."""

    clock: ClassVar[Clock]
    run: ClassVar[Run]

    @hookimpl
    def prepare_model(self, model: Any, run: Run) -> Any:
        """Keep the run, whose results are read at the end."""
        type(self).run = run
        return model

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Record the time, and the loss of a step."""
        if event.kind in ("start", "step"):
            self.clock.mark()
        if event.kind == "step":
            self.clock.losses.append(float(event.values["loss"]))
