"""A regulariser towards the base as a strategy."""

from __future__ import annotations

from budwood import LossTerm, Options, Step, Strategy, hookimpl
from pydantic import Field
from torch import Tensor


class BaseKl(Strategy):
    """Keeps the tuned model near its base: the divergence from the base's predictions at every label."""

    api = 2
    requires = ("adapter",)  # disabled to get the base's predictions
    uses_reference = "base"  # computed before the model's own forward

    class Options(Options):
        weight: float = Field(0.1, gt=0, description="weight of the divergence in the loss")

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        base = step.reference("base").logits(positions).float().log_softmax(-1)
        own = logits.float().log_softmax(-1)
        return LossTerm(self.name, (base.exp() * (base - own)).sum(-1), weight=self.options.weight)
