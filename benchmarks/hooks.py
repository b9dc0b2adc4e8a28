"""`python -m benchmarks.hooks`: the cost of the hook calls of one optimizer step, with four strategies that do nothing.

The strategies implement every hook of a step, two of them also as wrappers. The step has two micro-steps of four chunks
of labels. Target: at most 1 % of a 100 ms step.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from budwood.contract.examples import Batch
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy, hookimpl
from budwood.contract.types import Event, Outputs
from budwood.training.report import resident_peak

MICRO_STEPS, CHUNKS, REPEATS, TARGET = 2, 4, 2000, 1e-3
OUTPUTS = Outputs(torch.empty(0), torch.nn.Identity())


class Idle(Strategy):
    """Implements every hook of a step without doing anything."""

    @hookimpl
    def prepare_batch(self, run: Any, batch: Any) -> Any:
        return batch

    @hookimpl
    def token_terms(self, step: Any, logits: Any, positions: Any) -> None:
        return None

    @hookimpl
    def loss_terms(self, step: Any, outputs: Any) -> None:
        return None

    @hookimpl
    def before_clip(self, run: Any) -> None:
        return None

    @hookimpl
    def before_optimizer_step(self, run: Any) -> None:
        return None

    @hookimpl
    def after_optimizer_step(self, run: Any) -> None:
        return None

    @hookimpl
    def on_event(self, event: Any) -> None:
        return None


class Wrapping(Idle):
    """The same, and wraps forward and backward."""

    @hookimpl(wrapper=True)
    def forward(self, step: Any) -> Any:
        return (yield)

    @hookimpl(wrapper=True)
    def backward(self, step: Any) -> Any:
        return (yield)


class Core:
    """Replaces the task and the step."""

    @hookimpl
    def forward(self, step: Any) -> Any:
        return OUTPUTS

    @hookimpl
    def backward(self, step: Any) -> None:
        return None


def step(hooks: Composition) -> None:
    """Make the hook calls of one optimizer step."""
    dummy, empty = object(), torch.empty(0)
    batch = Batch(empty, empty, None, (), empty, empty, empty, empty, (), 0, ())
    for _ in range(MICRO_STEPS):
        hooks.chain("prepare_batch", "batch", batch, run=dummy)
        hooks.call("backward", step=dummy)
        hooks.call("forward", step=dummy)
        for _ in range(CHUNKS):
            hooks.call("token_terms", step=dummy, logits=dummy, positions=dummy)
        hooks.call("loss_terms", step=dummy, outputs=dummy)
    for name in ("before_clip", "before_optimizer_step", "after_optimizer_step"):
        hooks.call(name, run=dummy)
    hooks.notify(Event("step", 1, {}), print)


def main() -> None:
    """Run the benchmark and print the results."""
    hooks = Composition([Idle(name="a"), Wrapping(name="b"), Idle(name="c"), Wrapping(name="d")])
    hooks.measure(resident_peak, None)  # as in a CPU run
    hooks.register_core(Core(), "core")
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step(hooks)
        seconds.append(time.perf_counter() - started)
    cost = statistics.median(seconds)
    print(f"hook calls of a step, 4 strategies: {cost * 1e6:.0f} µs, {cost / 0.1:.3%} of a 100 ms step (target 1 %)")
    print("met" if cost <= TARGET else "MISSED")


if __name__ == "__main__":
    main()
