"""Distributions in at least single precision."""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities of logits [n, V], in fp32 or in a wider dtype that the logits have."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) [n] of log-probabilities [n, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
