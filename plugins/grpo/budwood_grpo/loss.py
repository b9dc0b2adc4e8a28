"""The clipped policy loss per label, in any dtype, and how it is averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from budwood import Batch, LossTerm


def log_ratio(log_probs: Tensor, old: Tensor, batch: Batch, ratio: str) -> Tensor:
    """Return the logarithm of the probability ratio at each label [L].

    "token": of the label itself (Shao et al., 2024, equation 3). "sequence": the mean over the answer's labels (Zheng
    et al., 2025, "GSPO", equation 7). "product": their sum, the ratio of the answer's probabilities.
    """
    difference = log_probs - old
    if ratio == "token":
        return difference
    sums, labels = per_example(difference, batch)
    return (sums / labels if ratio == "sequence" else sums)[batch.example_of_label]


def clipped(log_ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the loss -min(r A, clip(r) A) of each label [L], and whether clipping removes its gradient [L]."""
    ratios = log_ratios.exp()
    values = -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    stopped = ((ratios < 1 - low) & (advantages < 0)) | ((ratios > 1 + high) & (advantages > 0))
    return values, stopped


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return the estimate exp(q - p) - (q - p) - 1 of KL(policy ‖ reference) at each label (Schulman, 2020)."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


def aggregate(name: str, values: Tensor, batch: Batch, how: str, unit: str, weight: float = 1.0) -> LossTerm:
    """Return the term whose value is the mean of `values` [L] as `how` says; see the option `aggregation`."""
    from budwood import LossTerm

    if how == "token":
        return LossTerm(name, values, "label", weight)
    if how == "constant":
        return LossTerm(name, values, unit, weight)
    sums, labels = per_example(values, batch)
    return LossTerm(name, sums / labels, "example", weight)


def per_example(values: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the sum of `values` [L] over each example's labels, and the number of these labels [examples]."""
    zeros = values.new_zeros(len(batch.keys))
    owner = batch.example_of_label
    return zeros.index_add(0, owner, values), zeros.index_add(0, owner, torch.ones_like(values))
