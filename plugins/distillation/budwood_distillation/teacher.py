"""A loaded teacher: a separate model, or the run's model with its adapter disabled or another one active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood import RUN_ADAPTER, Batch, Reference, Run, autocast, use_adapters

TEACHER_ADAPTER = "teacher"


@dataclass(frozen=True)
class Teacher:
    """A model that computes the targets.

    Attributes:
        model: in evaluation mode and without gradients while it computes targets.
        owner: the strategy that switches from the run's adapter to `adapters`, if `model` is the run's own.
        adapters: names of the adapters that are active while it computes targets.
    """

    model: nn.Module
    owner: Any = None
    adapters: Sequence[str] = ()

    def read(self, run: Run, batch: Batch) -> Reference:
        """Run the teacher's decoder on a batch; the head is applied on access."""
        with self.teaching(run):
            outputs = run.task.outputs(self.model, batch)
            hidden = outputs.hidden.flatten(0, 1)[batch.label_positions]

        def logits(positions: Tensor) -> Tensor:
            with self.teaching(run):
                return outputs.head(hidden[positions])

        return Reference(hidden, None, logits)

    @contextmanager
    def teaching(self, run: Run) -> Iterator[None]:
        """Disable gradients, set evaluation mode, activate the teacher's adapters; restore everything afterwards."""
        training = self.model.training
        # The autocast cache would keep casts without gradients for the student's forward.
        cast = autocast(run, cache=False)
        try:
            if training:
                self.model.eval()
            if self.owner is not None:
                use_adapters(self.owner, self.model, self.adapters)
            with torch.no_grad(), cast:
                yield
        finally:
            if self.owner is not None:
                use_adapters(self.owner, self.model, [RUN_ADAPTER])
            if training:
                self.model.train()
