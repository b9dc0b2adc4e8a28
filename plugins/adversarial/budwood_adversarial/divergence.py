"""Divergences between the distributions of clean and noisy logits, in nats, for each label."""

from __future__ import annotations

from torch import Tensor


def symmetric_kl(clean: Tensor, noisy: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) = Σ (p − q)(log p − log q) [n], of logits [n, V] (Jiang et al., 2020, section 3.1)."""
    log_p, log_q = clean.float().log_softmax(-1), noisy.float().log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def kl(clean: Tensor, noisy: Tensor) -> Tensor:
    """KL(p‖q) [n] of logits [n, V], p a constant (Miyato et al., 2018, equation 5)."""
    log_p = clean.detach().float().log_softmax(-1)
    return (log_p.exp() * (log_p - noisy.float().log_softmax(-1))).sum(-1)
