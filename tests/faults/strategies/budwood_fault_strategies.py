"""Strategies that inject a fault at a step given in the recipe, as a third-party distribution."""

from __future__ import annotations

from typing import Any

import torch

from budwood import LossTerm, Options, Run, Step, Strategy, hookimpl

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "allocator": lambda: RuntimeError(f"{CPU} 281474976710656 bytes. Error code 12 (Cannot allocate memory)"),
    "host": MemoryError,
}


class Exhaust(Strategy):
    """Runs out of memory for any micro-batch of more than `tokens` tokens, from optimizer step `step` (from 1) on."""

    class Options(Options):
        where: str = "forward"
        step: int = 1
        tokens: int = 0
        error: str = "device"
        rank: int = -1

    def _check(self, where: str, step: Step) -> None:
        options, run = self.options, step.run
        here = options.where == where and run.step + 1 >= options.step and run.model.training
        if here and options.rank in (-1, run.process_index) and sum(step.batch.lengths) > options.tokens:
            raise ERRORS[options.error]()

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        outputs = yield
        self._check("forward", step)
        return outputs

    @hookimpl
    def token_terms(self, step: Step, logits: Any, positions: Any) -> None:
        self._check("head", step)

    @hookimpl(wrapper=True)
    def backward(self, step: Step) -> Any:
        if step.micro_step == 0:
            self.drawn = step.run.generator(self).normal_like(torch.zeros(1))
        yield
        self._check("backward", step)  # after the micro-batch's gradients were accumulated

    @hookimpl
    def before_clip(self, run: Run) -> None:
        run.log("drawn", self.drawn)


class Spoil(Strategy):
    """Makes loss or gradient non-finite at the optimizer steps `steps` (from 1)."""

    class Options(Options):
        what: str = "loss"
        steps: list[int] = [2]
        example: int = 3

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        outputs = yield
        ids = step.batch.keys
        if self.options.what == "loss" and step.run.step + 1 in self.options.steps and self.options.example in ids:
            bad = (step.batch.example_of_position == ids.index(self.options.example)).view(outputs.hidden.shape[:2])
            outputs.hidden = torch.where(bad[..., None], torch.nan, outputs.hidden)
        return outputs

    @hookimpl
    def loss_terms(self, step: Step, outputs: Any) -> LossTerm | None:
        if self.options.what != "gradient" or step.run.step + 1 not in self.options.steps:
            return None
        zero = sum((p.sum() * 0 for p in step.run.trainable), torch.zeros(()))
        return LossTerm("steep", zero.clamp(min=0).sqrt(), "step")  # value 0, infinite slope: a NaN gradient
