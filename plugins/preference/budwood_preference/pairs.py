"""Objectives on pairs: DPO against a reference; ORPO, SimPO and CPO without one.

Torch takes seconds to import, so it is imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from budwood import InputError, Strategy, hookimpl
from budwood_preference.options import CPOOptions, DPOOptions, ORPOOptions, SimPOOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Batch, LossTerm, Run, Step
    from budwood_preference.answers import Answers

PAIRS = "preference pairs"


class Compared(NamedTuple):
    """What an objective makes of pairs, one value each: its loss, and the rewards of both answers."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


class PairObjective(Strategy):
    """Base class: sums the log-probabilities of both answers, and logs and evaluates rewards, margins and accuracy.

    A subclass implements `compare`.
    """

    api = 2
    slots = ("objective",)
    trains_on = (PAIRS,)
    after = ("adapter",)
    learning_rate_scale = 0.1

    term_weight = 1.0
    """Weight of the objective in the loss."""

    @property
    def shows(self) -> tuple[str, ...]:
        return (f"{self.name}_accuracy",)

    @property
    def sft(self) -> float:
        """Weight of the task's own loss."""
        return float(self.options.sft)

    def compare(self, answers: Answers, reference: Tensor | None) -> Compared:
        """Return the loss and the rewards of pairs.

        Args:
            answers: of the batch's examples; chosen and rejected alternate.
            reference: [examples], the reference's log-probabilities.
        """
        raise NotImplementedError

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        from budwood import BestMetric

        run.task_weight *= self.sft
        run.best_metric = BestMetric("eval_accuracy", higher=True)
        return model

    @hookimpl
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        """Count the pairs, each with the weight of its row."""
        from budwood_preference.answers import row_weights

        if any(stop - start != 2 for start, stop in batch.groups):
            raise InputError(f"{self}: a group is not a pair: a strategy changed the examples.")
        if run.planning:  # values are unknown
            return {self._unit: float(len(batch.groups))}
        return {self._unit: float(row_weights(batch, self)[0::2].sum())}

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> list[LossTerm]:
        from budwood import LossTerm
        from budwood_preference.answers import sum_answers

        answers, reference = sum_answers(step.batch, log_probs), None
        if self.uses_reference:
            reference = sum_answers(step.batch, step.reference_log_probs().to(log_probs.dtype)).log_probs
        values = self.compare(answers, reference)
        weights = answers.weights[0::2]
        terms = [LossTerm(self.name, values.loss * weights, self._unit, self.term_weight)]
        return terms + [
            LossTerm(f"{self.name}_{name}", value.detach() * weights, self._unit, 0.0)
            for name, value in rewards(values, answers).items()
        ]

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        """Return the means over the held-out pairs, each with the weight of its row."""
        from budwood import eval_results, label_log_probs
        from budwood_preference.answers import measure, sum_answers

        def summed(batch: Batch) -> tuple[dict[str, float], float, float, int]:
            if self.uses_reference:
                answers, reference, kl = measure(run, batch)
            else:
                answers, reference, kl = sum_answers(batch, label_log_probs(run, batch)), None, 0.0
            values, weights = self.compare(answers, reference), answers.weights[0::2].double()
            columns = {self.name: values.loss, **rewards(values, answers)}
            weighted = {name: float((column.double() * weights).sum()) for name, column in columns.items()}
            return weighted, float(weights.sum()), kl, len(batch.labels)

        results = eval_results(run, summed)
        total, labels = sum(weight for _, weight, _, _ in results), sum(count for *_, count in results)
        metrics = {f"eval_{name}": sum(part[name] for part, *_ in results) / total for name in results[0][0]}
        if self.uses_reference:
            metrics["eval_kl"] = sum(kl for _, _, kl, _ in results) / labels
        return metrics

    @property
    def _unit(self) -> str:
        return f"{self.name}_pair"


class DPO(PairObjective):
    """Prefers the chosen answer over the rejected one, relative to a reference (Rafailov et al., 2023)."""

    Options = DPOOptions
    requires = ("adapter",)
    uses_reference = "start"

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self.caches_reference = self.options.reference == "cached"

    def compare(self, answers: Answers, reference: Tensor | None) -> Compared:
        """See `PairObjective.compare`."""
        from budwood_preference.losses import dpo

        options = self.options
        gains = answers.log_probs - reference
        scores = gains / answers.lengths if options.length_normalized or options.loss == "ipo" else gains
        loss = dpo(scores[0::2] - scores[1::2], options.loss, options.beta, options.label_smoothing)
        return Compared(loss, options.beta * gains[0::2], options.beta * gains[1::2])


class ORPO(PairObjective):
    """Trains on the chosen answers, and lowers the odds of the rejected ones; no reference (Hong et al., 2024)."""

    Options = ORPOOptions
    sft = 1.0

    @property
    def term_weight(self) -> float:
        """λ."""
        return float(self.options.weight)

    def compare(self, answers: Answers, reference: Tensor | None) -> Compared:
        """See `PairObjective.compare`; rewards are λ times the mean log-probabilities."""
        from budwood_preference.losses import odds_ratio

        chosen, rejected = answers.means[0::2], answers.means[1::2]
        weight = self.options.weight
        return Compared(odds_ratio(chosen, rejected), weight * chosen, weight * rejected)


class SimPO(PairObjective):
    """Compares the answers' mean log-probabilities, with a target margin; no reference (Meng et al., 2024)."""

    Options = SimPOOptions

    def compare(self, answers: Answers, reference: Tensor | None) -> Compared:
        """See `PairObjective.compare`."""
        from budwood_preference.losses import smoothed

        options = self.options
        chosen, rejected = options.beta * answers.means[0::2], options.beta * answers.means[1::2]
        return Compared(smoothed(chosen - rejected - options.gamma, options.label_smoothing), chosen, rejected)


class CPO(PairObjective):
    """Trains on the chosen answers, and prefers them over the rejected ones; no reference (Xu et al., 2024)."""

    Options = CPOOptions

    def compare(self, answers: Answers, reference: Tensor | None) -> Compared:
        """See `PairObjective.compare`."""
        from budwood_preference.losses import smoothed

        options = self.options
        chosen, rejected = options.beta * answers.log_probs[0::2], options.beta * answers.log_probs[1::2]
        return Compared(smoothed(chosen - rejected, options.label_smoothing), chosen, rejected)


def rewards(values: Compared, answers: Answers) -> dict[str, Tensor]:
    """Return what is logged and evaluated of pairs, one value each; an accuracy of one half for equal rewards."""
    margin = values.chosen - values.rejected
    return {
        "accuracy": (1 + margin.sign()) / 2,
        "margin": margin,
        "reward_chosen": values.chosen,
        "reward_rejected": values.rejected,
        "log_prob_chosen": answers.log_probs[0::2],
        "log_prob_rejected": answers.log_probs[1::2],
    }
