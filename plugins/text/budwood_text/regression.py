"""The task of numbers: a text's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from budwood import Dropped, Encoded, Encoder, EvalTotals, Example, Run, SequenceClassification, as_probe
from budwood_text.formats import REGRESSION


class SequenceRegression(SequenceClassification):
    """A number for each text, by a head with one output, trained on squared errors."""

    api = 2
    name = REGRESSION

    def planned_row(self, text: str, number: int) -> dict[str, Any]:
        """Return a text and its score."""
        return {"text": text, "score": float(number)}

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`."""
        results: list[Encoded | Dropped] = []
        for item, ids in zip(items, encoder.whole([item.text for item in items]), strict=True):
            cut = max(len(ids) - (encoder.max_length or len(ids)), 0)
            example = as_probe(encoder.cut(item.text, encoder.max_length or 0) if cut else ids)
            example.labels = np.array([item.score], dtype=np.float32)
            example.weights = np.array([item.weight], dtype=np.float32)
            results.append(Encoded([example], cut))
        return results

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return the text and its number."""
        return [*super().show(example, tokenizer), (" → ", False), (f"{float(example.labels[0]):.6g}", True)]

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Return that the head has one output, which is a number."""
        return {"num_labels": 1, "problem_type": "regression"}

    def has_log_probs(self) -> bool:
        """Return False: a number is no distribution."""
        return False

    def loss_is_log_prob(self) -> bool:
        """Return False."""
        return False

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error of each number."""
        return (self.predict(logits) - labels).square()

    def label_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the absolute error of each number."""
        return {"absolute_error": (self.predict(logits) - labels).abs()}

    def predict(self, logits: Tensor) -> Tensor:
        """Return the number of each row of logits [n, 1], in fp32 or wider."""
        return logits[:, 0].float() if logits.element_size() < 4 else logits[:, 0]

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Return R² and Spearman's rank correlation; 0 if all numbers are the same."""
        from scipy.stats import spearmanr
        from sklearn.metrics import r2_score

        truth, predicted = np.array(totals.pairs, dtype=np.float64).T
        varied = len(truth) > 1 and np.ptp(truth) > 0
        rank = float(spearmanr(truth, predicted).statistic) if varied and np.ptp(predicted) > 0 else 0.0
        return {"eval_r2": float(r2_score(truth, predicted)) if varied else 0.0, "eval_spearman": rank}

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return {"score": the number} of each text."""
        return [{"score": float(logits[0])} for logits in self.text_logits(model, tokenizer, texts)]

    def show_response(self, response: Any) -> str:
        """Return the number."""
        return f"{response['score']:.4f}"
