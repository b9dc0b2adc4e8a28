"""Divergences between a teacher's and a student's distributions, over a vocabulary or over the top k and the rest."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Return the divergence of a student q from a teacher p, for each row.

    - "forward-kl": KL(p ‖ q), minimised by a cross-entropy with soft labels (Hinton et al., 2015).
    - "reverse-kl": KL(q ‖ p).
    - "jensen-shannon": β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q (Agarwal et al., 2024, eq. 1). Over β
      it tends to the forward KL as β → 0, over 1 - β to the reverse one as β → 1.

    Args:
        log_p: [n, m] floating, normalised log-probabilities of the teacher, finite.
        log_q: [n, m] of the student.
        kind: one of the three.
        beta: β, above 0 and below 1.

    Returns:
        [n], in nats.
    """
    if kind == "forward-kl":
        return _kl(log_p, log_q)
    if kind == "reverse-kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def log_probabilities(logits: Tensor, size: int, temperature: float) -> Tensor:
    """Return the log-probabilities [n, size] of softmax(logits / T) over the first `size` entries, at least fp32.

    The other entries are padding.
    """
    return _scaled(logits, size, temperature).log_softmax(-1)


def bucketed(logits: Tensor, size: int, temperature: float, ids: Tensor) -> Tensor:
    """Return log-probabilities [n, k + 1] (at least fp32) of the entries `ids` [n, k] int64 and of the rest in total.

    `ids` are distinct in each row and fewer than `size`, so the rest is never empty and its logarithm is finite.
    """
    scaled = _scaled(logits, size, temperature)
    rest = scaled.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scaled.gather(1, ids), rest], -1) - scaled.logsumexp(-1, keepdim=True)


def _scaled(logits: Tensor, size: int, temperature: float) -> Tensor:
    values = logits[:, :size].to(torch.promote_types(logits.dtype, torch.float32))
    return values if temperature == 1 else values / temperature  # avoids copying a chunk over a large vocabulary


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
