"""KTO: answers judged one by one, against a baseline over the whole optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from budwood import DESIRABLE, BestMetric, Column, Example, InputError, Strategy, hookimpl
from budwood_preference.options import KTOOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Batch, LossTerm, Outputs, Run, Step

MISMATCHED = "kto_mismatched"
"""Column: 1 for another row's answer to a prompt, of which the baseline is the mean."""


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
        given = list(examples)
        found = {float(example.columns[DESIRABLE].values): example for example in reversed(given)}
        if len(found) < 2:
            value, first = next(iter(found.items()))
            where = examples.rows.location(first.row) if hasattr(examples, "rows") else f"row {first.row + 1}"
            raise InputError(
                f"{where}: like all {len(given):,} answers it is judged {'good' if value else 'bad'}: {self} compares "
                "both. Add the others, or train without it on the good ones."
            )
        prepared, missing = [], 0
        answers = _others(given, run.seed)
        for group in _groups(given):
            extra = [_mismatch(example, answers[example.key], examples_length(examples)) for example in group]
            number = len(prepared)
            kept = [each for each in extra if each is not None]
            missing += len(extra) - len(kept)
            prepared += [replace(e, group=number, columns={**e.columns, MISMATCHED: _flag(0)}) for e in group]
            prepared += [replace(e, group=number) for e in kept]
        if missing:
            run.say(f"{self.name}: {missing:,} prompts leave no room for another answer; the baseline is without them")
        return prepared

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
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
        from budwood_preference.answers import sum_answers

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

        from budwood import eval_results
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


def examples_length(examples: Any) -> int | None:
    """Return the run's maximum length in tokens, if the examples know it."""
    return getattr(examples, "max_length", None)


def _flag(value: int) -> Column:
    return Column(np.array(value, dtype=np.float32))


def _groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if group and (example.group is None or example.group != group[-1].group):
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def _others(examples: Sequence[Example], seed: int) -> dict[Any, Example]:
    """Return another row's example for each by its key: each row takes that before it in a random cycle of all rows."""
    rows: dict[int, list[Example]] = {}
    for example in examples:
        rows.setdefault(example.row, []).append(example)
    order = [list(rows)[i] for i in np.random.default_rng([seed, len(rows)]).permutation(len(rows))]
    donors = dict(zip(order, [order[-1], *order[:-1]], strict=True))
    return {
        example.key: rows[donors[row]][number % len(rows[donors[row]])]
        for row, own in rows.items()
        for number, example in enumerate(own)
    }


def _mismatch(example: Example, other: Example, max_length: int | None) -> Example | None:
    """Return the prompt of an example with the answer of another; None if there is no room for the answer."""
    first, start = int(example.label_positions[0]), int(other.label_positions[0])
    prompt, answer = example.inputs["input_ids"][: first + 1], other.inputs["input_ids"][start + 1 :]
    ids = np.concatenate([prompt, answer])[:max_length]
    positions = other.label_positions - start + first
    kept = positions + 1 < len(ids)
    if not kept.any():
        return None
    weights = np.full(int(kept.sum()), example.weights[0], dtype=np.float32)
    return replace(
        example, inputs={**example.inputs, "input_ids": ids}, label_positions=positions[kept],
        labels=other.labels[kept], weights=weights, key=f"{example.key} mismatched",
        columns={**example.columns, DESIRABLE: _flag(0), MISMATCHED: _flag(1)},
    )  # fmt: skip
