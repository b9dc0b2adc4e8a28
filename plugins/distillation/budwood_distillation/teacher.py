"""A loaded teacher: a model of its own, or the run's model with its adapter off or another one on."""

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
    """What teaches.

    Attributes:
        model: in evaluation mode while it teaches; every parameter frozen or its gradient off.
        owner: the strategy that switches the run's adapter off and `adapters` on, where `model` is the run's own.
        adapters: names of the adapters in use while it teaches.
    """

    model: nn.Module
    owner: Any = None
    adapters: Sequence[str] = ()

    def read(self, run: Run, batch: Batch) -> Reference:
        """Run the teacher on a batch up to its head."""
        with self.teaching(run):
            outputs = run.task.outputs(self.model, batch)
            hidden = outputs.hidden.flatten(0, 1)[batch.label_positions]

        def logits(positions: Tensor) -> Tensor:
            with self.teaching(run):
                return outputs.head(hidden[positions])

        return Reference(hidden, None, logits)

    @contextmanager
    def teaching(self, run: Run) -> Iterator[None]:
        """No gradients, evaluation mode, the teacher's adapters; all as it was afterwards."""
        training = self.model.training
        # Without its cache, in which casts made without a gradient would stay for the student's own forward.
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
