"""Regularisers of the trained parameters: one value per optimizer step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from budwood import LossTerm, Options, Strategy, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from budwood import Run, Step

LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def is_counted(step: Step) -> bool:
    """Whether a term that depends on the parameters alone belongs to this pass: once per optimizer step."""
    return not (step.micro_step or step.replaying or step.run.process_index)


def named(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each trained parameter, in the order of `run.trainable`."""
    for group in run.groups:
        yield from group.parameters.items()


class L2SP(Strategy):
    """Keeps the trained parameters near their values at the start: alpha / 2 · ‖θ − θ₀‖² (Li et al., 2018)."""

    api = 2

    class Options(Options):
        alpha: float = Field(0.01, gt=0, description="weight of the distance from the start")
        beta: float = Field(0.01, ge=0, description="weight of the squared norm of what the base lacks, such as a head")

    @hookimpl
    def loss_terms(self, step: Step) -> list[LossTerm] | None:
        if not is_counted(step):
            return None
        saved = step.run.start_adapter.infos if step.run.start_adapter is not None else {}
        new = {name for name in step.run.base.new if f"base_model.model.{name}" not in saved}
        distance = norm = step.run.trainable[0].new_zeros(())
        for (name, parameter), start in zip(named(step.run), step.run.start, strict=True):
            if name in new:
                norm = norm + parameter.square().sum() / 2
            else:
                distance = distance + (parameter - start).square().sum() / 2
        terms = [LossTerm("l2_sp", distance, "step", self.options.alpha)]
        return [*terms, LossTerm("l2_sp_new", norm, "step", self.options.beta)] if new else terms


class LayerDecay(Strategy):
    """Weight decay by layer: ½ Σ λₗ ‖θₗ‖², where λₗ grows or falls from the last layer to the first."""

    api = 2

    class Options(Options):
        weight: float = Field(0.01, gt=0, description="λ of the last layer")
        factor: float = Field(1.1, gt=0, description="λ of a layer divided by that of the layer above it")

    @hookimpl
    def loss_terms(self, step: Step) -> LossTerm | None:
        if not is_counted(step):
            return None
        layers = [(int(found[1]), p) for name, p in named(step.run) if (found := LAYER.search(name))]
        last = max((layer for layer, _ in layers), default=0)
        total = step.run.trainable[0].new_zeros(())
        for layer, parameter in layers:
            total = total + self.options.factor ** (last - layer) * parameter.square().sum() / 2
        return LossTerm("layer_decay", total, "step", self.options.weight)
