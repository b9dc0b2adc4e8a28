"""Log-probabilities of complete answers: sums over the labels of each example of a batch, and the reference's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood import Batch, InputError, Run, read_reference

CHUNK = 256
"""Labels whose logits are in memory at once in an evaluation."""


@dataclass(frozen=True)
class Answers:
    """The answers of a batch, one value per example.

    Attributes:
        log_probs: [examples], the sum over the answer's labels.
        lengths: [examples], the number of labels.
        weights: [examples], the weight of the answer's row.
    """

    log_probs: Tensor
    lengths: Tensor
    weights: Tensor

    @property
    def means(self) -> Tensor:
        """[examples], the mean over the answer's labels."""
        return self.log_probs / self.lengths


def sum_answers(batch: Batch, log_probs: Tensor) -> Answers:
    """Sum the log-probabilities [L] of the labels of each answer; a label's weight is that of its row."""
    zeros, owner = log_probs.new_zeros(len(batch.keys)), batch.example_of_label
    lengths = zeros.index_add(0, owner, torch.ones_like(log_probs))
    weights = zeros.index_add(0, owner, batch.weights.to(log_probs.dtype)) / lengths.clamp(min=1)
    return Answers(zeros.index_add(0, owner, log_probs), lengths, weights)


def row_weights(batch: Batch, who: Any) -> Tensor:
    """Return the weight of each example's row, [examples] float64; the batch is on the host.

    Raises:
        InputError: the labels of an answer have different weights, so the row's is unknown.
    """
    weights, owner = batch.weights.double(), batch.example_of_label
    most, least = weights.new_zeros(len(batch.keys)), weights.new_full((len(batch.keys),), torch.inf)
    most, least = most.scatter_reduce(0, owner, weights, "amax"), least.scatter_reduce(0, owner, weights, "amin")
    if (most > least).any():
        row = batch.source_rows[int((most > least).int().argmax())]
        raise InputError(f"{who}: row {row + 1}: a strategy gave the labels of an answer different weights.")
    return most


def measure(run: Run, batch: Batch) -> tuple[Answers, Tensor, float]:
    """Return the policy's answers of an evaluation batch, the reference's log-probabilities [examples], and the KL.

    The KL is the sum over the batch's labels of KL(policy ‖ reference) of the next token, in nats.
    """
    outputs, reference = run.task.outputs(run.model, batch), read_reference(run, batch)
    rows = outputs.hidden.flatten(0, -2)[batch.label_positions]
    log_probs: list[Tensor] = []
    kl = 0.0
    for positions in torch.arange(len(batch.labels), device=rows.device).split(CHUNK):
        ours, theirs = outputs.head(rows[positions]), reference.logits(positions)
        log_probs.append(run.task.log_probs(ours, batch.labels[positions]))
        dtype = torch.promote_types(ours.dtype, torch.float32)
        log_p, log_q = ours.to(dtype).log_softmax(-1), theirs.to(dtype).log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return sum_answers(batch, torch.cat(log_probs)), sum_answers(batch, reference.log_probs).log_probs, kl
