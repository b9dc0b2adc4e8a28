"""The task of a reward model (Bradley & Terry, 1952; Ouyang et al., 2022, equation 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budwood import (
    Batch,
    CausalLM,
    Dropped,
    Encoded,
    Encoder,
    LossTerm,
    Outputs,
    Run,
    SequenceClassification,
    Step,
    hookimpl,
    over_eval_batches,
)


class RewardModel(SequenceClassification):
    """Scores of answers: a scalar head, trained to score the chosen answer of a pair above the rejected one."""

    api = 2
    name = "reward-model"
    trains_on = ("preference pairs",)
    peft_task_type = None
    best_metric = "eval_accuracy"
    lower_is_better = False
    gathers_predictions = False

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`. An answer has one label, at its last token: 1 if it was chosen, otherwise 0."""
        results: list[Encoded | Dropped] = []
        for result in CausalLM().encode(items, where, encoder):
            if isinstance(result, Encoded):
                examples = [
                    replace(
                        example,
                        label_positions=np.array([len(example.inputs["input_ids"]) - 1]),
                        labels=np.array([1 - index], dtype=np.float32),
                        weights=example.weights[:1],
                        columns={},
                    )
                    for index, example in enumerate(result.examples)
                ]
                result = replace(result, examples=examples)
            results.append(result)
        return results

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Return that the head has one output."""
        return {"num_labels": 1}

    def has_log_probs(self) -> bool:
        """Return False: a score is no distribution."""
        return False

    def loss_is_log_prob(self) -> bool:
        """Return False."""
        return False

    def read_texts(self, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text as training reads an answer: ended by the token at which it is scored."""
        encoder, special = Encoder(tokenizer), set(tokenizer.all_special_ids)
        rows = []
        for text, read in zip(texts, super().read_texts(model, tokenizer, texts), strict=True):
            (ids,), (whole,) = encoder.start([text]), encoder.whole([text])
            if not ids or ids[-1] not in special:
                ids.append(encoder.end(text))
            rows.append(ids if len(read) == len(whole) else [*ids[: len(read) - 1], ids[-1]])  # or it is truncated
        return rows

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return {"score": the text's score} of each text: a prompt with its answer."""
        return [{"score": float(logits[0])} for logits in self.text_logits(model, tokenizer, texts)]

    def show_response(self, response: Any) -> str:
        """Return the score."""
        return f"{response['score']:.4f}"

    def gaps(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the chosen minus the rejected answer's score in each pair, and the pairs' weights, both [pairs]."""
        scores = self.logits(outputs, batch)[:, 0]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        first = torch.tensor([start for start, _ in batch.groups], device=scores.device)
        return scores[first] - scores[first + 1], batch.weights[first]

    @hookimpl
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        """Count pairs by their weights."""
        if run.planning:  # values are unknown
            return {"pair": batch.total_weight / 2}
        first = torch.tensor([start for start, _ in batch.groups])
        return {"pair": float(batch.weights[first].sum(dtype=torch.float64))}

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> None:
        """Return nothing: the loss is that of pairs."""

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm:
        """Return -log σ(score of the chosen answer - score of the rejected one) of each pair, times its weight."""
        gaps, weights = self.gaps(outputs, step.batch)
        return LossTerm("reward_model", -F.logsigmoid(gaps) * weights, "pair", step.run.task_weight)

    def measure(self, run: Run, noise: Callable[[Batch], Tensor | None] | None = None) -> dict[str, float]:
        """Return loss, accuracy (share of pairs in the right order) and mean margin over `run.eval_examples`."""

        def sums(batch: Batch) -> Tensor:
            with self.noisy(run.model, None if noise is None else noise(batch)):
                gaps, weights = (values.double() for values in self.gaps(self.outputs(run.model, batch), batch))
            values = (torch.ones_like(gaps), -F.logsigmoid(gaps), (gaps > 0).double(), gaps)
            return torch.stack([(value * weights).sum() for value in values])

        total = torch.zeros(4, dtype=torch.float64, device=run.device)
        for part in over_eval_batches(run, sums):
            total += part
        run.world.sum([total])
        weight, *means = total.tolist()
        return {f"eval_{name}": mean / weight for name, mean in zip(("loss", "accuracy", "margin"), means, strict=True)}
