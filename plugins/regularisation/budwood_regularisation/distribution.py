"""Regularisers of the model's distribution: one value per label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from budwood import LossTerm, Options, Strategy, hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Outputs, Plan, Run, Step


class _OfDistribution(Strategy):
    """A term of the distribution over tokens or classes at every label."""

    api = 2

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.task is not None and not plan.task.has_log_probs():
            plan.problem(self, f"{plan.task} has no distribution over tokens or classes: remove the strategy")


class KLStart(_OfDistribution):
    """Keeps the model's predictions near those of the start of the run: the divergence from them at every label."""

    requires = ("adapter",)
    uses_reference = "start"

    class Options(Options):
        weight: float = Field(0.1, gt=0, description="weight of the divergence")
        direction: Literal["reverse", "forward"] = Field(
            "reverse", description="reverse: KL(model ‖ start); forward: KL(start ‖ model)"
        )

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        from budwood_regularisation.divergence import kl, log_softmax

        start, own = log_softmax(step.reference().logits(positions)), log_softmax(logits)
        values = kl(own, start) if self.options.direction == "reverse" else kl(start, own)
        return LossTerm("kl_start", values, weight=self.options.weight)


class Entropy(_OfDistribution):
    """Rewards or penalises the entropy of the predictions (Pereyra et al., 2017; Grandvalet & Bengio, 2004)."""

    class Options(Options):
        weight: float = Field(0.01, gt=0, description="weight of the entropy")
        direction: Literal["bonus", "penalty"] = Field(
            "bonus", description="bonus: subtract it from the loss, against overconfidence; penalty: add it"
        )

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        from budwood_regularisation.divergence import log_softmax

        log_p = log_softmax(logits)
        sign = -1 if self.options.direction == "bonus" else 1
        return LossTerm("entropy", -(log_p.exp() * log_p).sum(-1), weight=sign * self.options.weight)


class LabelSmoothing(_OfDistribution):
    """Smooths the labels: (1 − ε) of the task's loss plus ε of the mean over all classes (Szegedy et al., 2016)."""

    class Options(Options):
        epsilon: float = Field(0.1, gt=0, lt=1, description="share of the uniform distribution in the target")

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.task_weight *= 1 - self.options.epsilon
        return model

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        from budwood_regularisation.divergence import log_softmax

        epsilon = self.options.epsilon
        weight = step.run.task_weight * epsilon / (1 - epsilon)
        values = -log_softmax(logits).mean(-1)
        return step.run.task.own_term(step, values, positions, "label_smoothing", weight)


class Focal(_OfDistribution):
    """Multiplies each label's loss by (1 − p)^γ, so that easy labels count less (Lin et al., 2017)."""

    class Options(Options):
        gamma: float = Field(2.0, gt=0, description="exponent γ")

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm:
        rest = -log_probs.expm1()  # 1 − p
        rest = rest.clamp(min=1e-12)  # below γ = 1 the derivative at p = 1 is infinite
        # The task's own term is −log p: what is missing to the focal loss is the difference.
        return step.run.task.own_term(step, (rest**self.options.gamma - 1) * -log_probs, name="focal")


class RDrop(_OfDistribution):
    """Two passes with different dropout that must agree: their mean loss and divergence (Wu et al., 2021)."""

    after = ("adapter",)

    class Options(Options):
        alpha: float = Field(1.0, gt=0, description="weight of the divergence between the two passes")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._second: Outputs | None = None

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        super().check_plan(plan)
        chosen = any(getattr(strategy.options, "dropout", 0) for strategy in plan.strategies)
        if plan.model is not None and not chosen and not _drops(plan.model):
            plan.problem(self, "nothing drops out, so both passes are equal: set dropout of the adapter, such as 0.1")

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.task_weight *= 0.5  # the other half is that of the second pass
        return model

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Iterator[None]:
        self._second = None
        return (yield)

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> list[LossTerm]:
        from budwood_regularisation.divergence import kl, log_softmax

        if self._second is None:  # the first chunk of a pass
            self._second = step.forward(step.noise)
        again = step.logits(self._second, positions)
        one, two = log_softmax(logits), log_softmax(again)
        nll = step.run.task.loss(again, step.batch.labels[positions])
        return [
            step.run.task.own_term(step, nll, positions, "r_drop_nll"),
            LossTerm("r_drop", (kl(one, two) + kl(two, one)) / 2, weight=self.options.alpha / 2),
        ]


def _drops(model: nn.Module) -> bool:
    return any(type(m).__name__ == "Dropout" and getattr(m, "p", 0) > 0 for m in model.modules())
