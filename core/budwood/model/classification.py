"""What tasks with classes have in common, whatever is classified: the head, the metrics, the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from budwood.contract.types import Run
from budwood.model.evaluation import EvalTotals, at_least_fp32
from budwood.model.ops.cross_entropy import cross_entropy
from budwood.model.task import Task


class Classification(Task):
    """Base class of tasks that predict one of the classes of the training data."""

    gathers_predictions = True

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Return the number and names of the classes; without any, those of the base's own configuration remain."""
        if not labels:
            return {}
        names = dict(enumerate(labels))
        return {"num_labels": len(labels), "id2label": names, "label2id": {v: k for k, v in names.items()}}

    def head_modules(self, model: nn.Module) -> list[str]:
        """Return the name of the classification head: `score`, `classifier`, or what is outside the model's body."""
        body: Any = model.base_model_prefix
        outside = [name for name, module in model.named_children() if name != body and [*module.parameters()]]
        return [name for name in ("score", "classifier") if hasattr(model, name)] or outside

    def loss_is_log_prob(self) -> bool:
        """Return True: the cross-entropy of a class is the negative of its log-probability."""
        return True

    def log_probs(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Task.log_probs`."""
        return -cross_entropy(logits if temperature == 1 else at_least_fp32(logits) / temperature, labels)

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Return macro F1, and set `report` to the classification report."""
        from sklearn.metrics import classification_report, f1_score

        truth, predicted = np.array(totals.pairs).T
        examples = run.examples if run.examples is not None else run.eval_examples
        names = examples.labels if examples is not None else []
        shown = np.unique(np.concatenate([truth, predicted]))  # those that the macro F1 is a mean of
        self.report = classification_report(
            truth, predicted, labels=shown, target_names=[names[i] for i in shown], zero_division=0
        )
        macro = f1_score(truth, predicted, average="macro", zero_division=0)
        return {"eval_macro_f1": float(macro)}

    def label_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return whether the most probable class is the label."""
        return {"accuracy": (logits.argmax(-1) == labels).float()}

    def answer(self, logits: Tensor, labels: Sequence[str]) -> dict[str, Any]:
        """Return {"label": the most probable class, "probabilities": of all classes} from logits [classes]."""
        probabilities: dict[str, float] = dict(zip(labels, logits.softmax(-1).tolist(), strict=True))
        return {"label": max(probabilities, key=lambda label: probabilities[label]), "probabilities": probabilities}

    def show_response(self, response: Any) -> str:
        """Return the class and its probability."""
        return f"{response['label']} ({response['probabilities'][response['label']]:.1%})"
