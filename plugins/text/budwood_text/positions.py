"""What tasks have in common whose model has an output for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from budwood import Batch, Outputs, TextTask, is_causal, pooled_logits, takes_segments


class OutputPerToken(TextTask):
    """Base class of tasks with an output for each token, of encoders and decoders alike."""

    def body(self, model: nn.Module) -> nn.Module:
        """Return the part of the model below its head."""
        prefix: Any = model.base_model_prefix
        return model.get_submodule(prefix)

    def pools_examples(self, model: nn.Module) -> bool:
        """Return False: there is an output for each token."""
        return False

    def packs_rows(self, model: nn.Module) -> bool:
        """Return whether the model's body takes positions and the boundaries of examples."""
        return is_causal(model.config) or takes_segments(self.body(model))

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model below its head; the head is the model's own forward on rows of that output."""
        body = self.body(model)
        hidden = body(**self.body_inputs(body, batch, is_causal(model.config))).last_hidden_state
        return Outputs(hidden, lambda rows: pooled_logits(model, body, rows[None], {})[0])

    def own_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.own_logits`."""
        logits: Tensor = model(input_ids=batch.inputs["input_ids"]).logits[0]
        return logits[batch.label_positions]

    def label_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return whether the most probable class is the label."""
        return {"accuracy": (logits.argmax(-1) == labels).float()}


def refuse_empty(texts: Sequence[str]) -> None:
    """Refuse an empty text.

    Raises:
        InputError: the message has its number.
    """
    from budwood import InputError

    empty = next((number for number, text in enumerate(texts, 1) if not text.strip()), 0)
    if empty:
        raise InputError(f"text {empty} is empty.")
