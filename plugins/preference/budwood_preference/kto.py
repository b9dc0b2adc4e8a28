"""KTO: answers judged one by one, against a baseline over the whole optimizer step.

Torch takes seconds to import, so it is imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from budwood import InputError, Strategy, hookimpl
from budwood_preference.options import KTOOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Batch, Example, LossTerm, Outputs, Run, Step


class KTO(Strategy):
    """Raises desirable answers above the policy's mean divergence from a reference, and lowers others below it."""

    api = 2
    Options = KTOOptions
    slots = ("objective",)
    requires = ("adapter",)
    after = ("adapter",)
    trains_on = ("judged answers", "preference pairs")
    uses_reference = "start"
    learning_rate_scale = 0.1

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self.caches_reference = self.options.reference == "cached"

    @hookimpl
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Check that both labels occur, and add another row's answer to each prompt, for the baseline."""
        from budwood import DESIRABLE
        from budwood_preference.mismatched import add_mismatched

        given = list(examples)
        found = {float(example.columns[DESIRABLE].values): example for example in reversed(given)}
        if given and len(found) < 2:
            value, first = next(iter(found.items()))
            where = examples.rows.location(first.row) if hasattr(examples, "rows") else f"row {first.row + 1}"
            raise InputError(
                f"{where}: like all {len(given):,} answers it is judged {'good' if value else 'bad'}: {self} compares "
                "both. Add the others, or train without it on the good ones."
            )
        prepared, missing = add_mismatched(given, run.seed, getattr(examples, "max_length", None))
        if missing:
            run.say(f"{self.name}: {missing:,} prompts leave no room for another answer; the baseline is without them")
        return prepared

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        from budwood import DESIRABLE, BestMetric

        run.task_weight *= self.options.sft
        if run.eval_examples is not None:
            labels = {float(example.columns[DESIRABLE].values) for example in run.eval_examples}
            if len(labels) == 2:
                run.best_metric = BestMetric("eval_accuracy", higher=True)
            else:
                run.say(f"note: the evaluation data has only one label, so the best adapter is not that of {self.name}")
        return model

    @hookimpl
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        """Check that each answer has one weight."""
        from budwood_preference.answers import row_weights

        if not run.planning:
            row_weights(batch, self)
        return {}

    @hookimpl
    def step_values(self, step: Step, outputs: Outputs, log_probs: Tensor) -> dict[str, Tensor]:
        from budwood import DESIRABLE
        from budwood_preference.answers import sum_answers
        from budwood_preference.mismatched import MISMATCHED

        answers = sum_answers(step.batch, log_probs)
        reference = sum_answers(step.batch, step.reference_log_probs().to(answers.log_probs.dtype))
        return {
            "gain": answers.log_probs - reference.log_probs,
            "desirable": step.batch.columns[DESIRABLE].long(),
            "mismatched": step.batch.columns[MISMATCHED].long(),
            "weight": answers.weights,
        }

    @hookimpl
    def step_terms(self, run: Run, values: dict[str, Tensor]) -> LossTerm:
        """The mean loss of the step's answers; the baseline is a constant (Ethayarajh et al., 2024, section 4.1)."""
        from budwood import LossTerm
        from budwood_preference.losses import kto

        options, gain = self.options, values["gain"]
        clean, mismatched = gain.detach(), values["mismatched"].to(gain.dtype)
        desirable = values["desirable"].to(gain.dtype)
        weight = values["weight"].detach() * (1 - mismatched)  # no shape here depends on values
        baseline = ((clean * mismatched).sum() / mismatched.sum().clamp(min=1)).clamp(min=0)
        side = desirable * options.desirable_weight + (1 - desirable) * options.undesirable_weight
        losses = kto(gain, baseline, desirable, options.beta) * side * weight
        run.log(f"{self.name}_kl", baseline)
        for name, mask in (("desirable", desirable * weight), ("undesirable", (1 - desirable) * weight)):
            if run.planning or bool(mask.any()):
                run.log(f"{self.name}_reward_{name}", options.beta * (clean * mask).sum() / mask.sum())
        return LossTerm(self.name, losses.sum() / weight.sum(), "step")

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        """Return rewards, their margin, and how often a desirable answer's is larger than an undesirable one's."""
        import torch

        from budwood import DESIRABLE, eval_results
        from budwood_preference.answers import measure

        def listed(batch: Batch) -> tuple[list[list[float]], float, int]:
            answers, reference, kl = measure(run, batch)
            reward = self.options.beta * (answers.log_probs - reference)
            columns = (reward, answers.log_probs, answers.weights, batch.columns[DESIRABLE])
            return [column.tolist() for column in columns], kl, len(batch.labels)

        results = eval_results(run, listed)
        table = torch.cat([torch.tensor(rows, dtype=torch.float64) for rows, _, _ in results], 1)
        reward, log_probs, weight, desirable = table
        metrics = {"eval_kl": sum(kl for _, kl, _ in results) / sum(count for *_, count in results)}
        sides = {"desirable": desirable == 1, "undesirable": desirable == 0}
        for name, side in sides.items():
            if side.any():
                metrics[f"eval_reward_{name}"] = float((reward * weight)[side].sum() / weight[side].sum())
                metrics[f"eval_log_prob_{name}"] = float((log_probs * weight)[side].sum() / weight[side].sum())
        if all(side.any() for side in sides.values()):
            good, bad = sides.values()
            metrics["eval_margin"] = metrics["eval_reward_desirable"] - metrics["eval_reward_undesirable"]
            metrics["eval_accuracy"] = _ordered(reward[good], weight[good], reward[bad], weight[bad])
        return metrics


def _ordered(good: Tensor, good_weight: Tensor, bad: Tensor, bad_weight: Tensor) -> float:
    """Return the weighted share of pairs of a good and a bad reward in which the good one is larger.

    Pairs of equal rewards count one half.
    """
    import torch

    order = bad.argsort()
    below = torch.cat([bad_weight.new_zeros(1), bad_weight[order].cumsum(0)])
    first, last = (torch.searchsorted(bad[order], good, right=right) for right in (False, True))
    shares = (below[first] + below[last]) / 2 / below[-1]
    return float((shares * good_weight).sum() / good_weight.sum())
