"""The reference of objectives: the run's model with its adapter disabled, or in its state at the start of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from budwood.adapters.use import use_adapters
from budwood.contract.examples import Batch
from budwood.contract.strategy import RUN_ADAPTER
from budwood.contract.types import Reference, Run
from budwood.errors import InputError
from budwood.model.evaluation import CHUNK, autocast


def read_reference(run: Run, batch: Batch, start: bool = False) -> Reference:
    """Run the reference model on a batch; see `Step.reference`."""
    with as_reference(run, start):
        outputs = run.task.outputs(run.model, batch)
        hidden = outputs.hidden.flatten(0, -2)[batch.label_positions]
        log_probs = None
        if run.task.has_log_probs():
            parts = zip(hidden.split(CHUNK), batch.labels.split(CHUNK), strict=True)
            log_probs = torch.cat([run.task.log_probs(outputs.head(rows), labels) for rows, labels in parts])

    def logits(positions: Tensor) -> Tensor:
        with as_reference(run, start):
            return outputs.head(hidden[positions])

    return Reference(hidden, log_probs, logits)


def as_reference(run: Run, start: bool) -> AbstractContextManager[None]:
    """Turn the model into the reference inside the context: evaluation mode, no gradients."""
    return _start_parameters(run) if start else adapter_off(run)


@contextmanager
def adapter_off(run: Run) -> Iterator[None]:
    """Make `run.model` compute as its base inside the context: adapter disabled, evaluation mode, no gradients.

    Raises:
        InputError: no strategy of the run owns an adapter; declare `requires = ("adapter",)`.
    """
    owner = next((strategy for strategy in run.strategies if "adapter" in strategy.slots), None)
    if owner is None:
        raise InputError("no strategy of the recipe owns an adapter that could be disabled: add one such as lora.")
    use_adapters(owner, run.model)
    try:
        with _inference(run):
            yield
    finally:
        use_adapters(owner, run.model, [RUN_ADAPTER])


@contextmanager
def _start_parameters(run: Run) -> Iterator[None]:
    """Give `run.model` inside the context its trainable parameters from before the first step."""
    parameters = run.trainable
    current = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, run.start, strict=True):
        parameter.data = value
    try:
        with _inference(run):
            yield
    finally:
        for parameter, value in zip(parameters, current, strict=True):
            parameter.data = value


@contextmanager
def _inference(run: Run) -> Iterator[None]:
    training = run.model.training
    run.model.eval()
    try:
        # Without autocast's cache: casts made without a gradient would be reused by a forward that needs one.
        with torch.no_grad(), autocast(run, cache=False):
            yield
    finally:
        run.model.train(training)
