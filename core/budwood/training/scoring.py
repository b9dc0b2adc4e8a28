"""Log-probabilities and hidden states of examples that are not part of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from budwood.contract.examples import Batch, Example
from budwood.contract.types import Outputs, Run
from budwood.data.packing import split_micro
from budwood.model.evaluation import collate_for, extra_passes, head_rows
from budwood.training.label_scores import chunks
from budwood.training.reference import as_reference, inference


def example_log_probs(
    run: Run, examples: Sequence[Example], temperature: float = 1.0, reference: Literal["", "start", "base"] = ""
) -> list[np.ndarray]:
    """Return the log-probabilities of the labels of each example, [L] float32, in evaluation mode without gradients.

    Args:
        temperature: divides the logits.
        reference: "": the current model; "start" or "base": see `Strategy.uses_reference`.

    Raises:
        InputError: the task has no log-probabilities, or no strategy owns an adapter that could be disabled.
    """
    extra = {} if temperature == 1 else {"temperature": temperature}

    def log_probs(outputs: Outputs, batch: Batch) -> Tensor:
        flat = outputs.hidden.flatten(0, -2)
        return torch.cat(
            [
                run.task.log_probs(outputs.head(rows), batch.labels[chunk], **extra)
                for chunk, rows in chunks(batch, flat, head_rows(run, 2))
            ]
        )

    return _at_labels(run, examples, log_probs, reference)


def example_hidden(run: Run, examples: Sequence[Example]) -> list[np.ndarray]:
    """Return the hidden states at the label positions of each example, [L, d] float32, as `example_log_probs` does.

    A head of its own, such as a reward model's, can be applied to them.
    """

    def hidden(outputs: Outputs, batch: Batch) -> Tensor:
        return outputs.hidden.flatten(0, -2)[batch.label_positions]

    return _at_labels(run, examples, hidden)


def _at_labels(
    run: Run,
    examples: Sequence[Example],
    work: Callable[[Outputs, Batch], Tensor],
    reference: Literal["", "start", "base"] = "",
) -> list[np.ndarray]:
    """Return `work(outputs, batch)` [labels of the batch, …] of all examples, split by example."""
    results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(examples)
    lengths = np.array([run.task.length(example) for example in examples], dtype=np.int64)
    with as_reference(run, reference) if reference else inference(run):
        rows = split_micro(range(len(examples)), lengths, run.micro_tokens, run.packed)
        extra = extra_passes(run, len(rows))  # asked before any pass, in which the processes wait too
        for row in rows:
            members = [examples[index] for index in row]
            batch = collate_for(run, members, "eval").to(run.device)
            values = work(run.task.outputs(run.model, batch), batch).float().cpu().numpy()
            counts = np.cumsum([len(example.labels) for example in members])
            for index, part in zip(row, np.split(values, counts[:-1]), strict=True):
                results[index] = part
        for _ in range(extra):
            run.task.outputs(run.model, collate_for(run, [run.examples[0]], "eval").to(run.device))
    return results
