"""The losses of preference objectives, as functions of the answers' log-probabilities.

All take and return tensors of one value per pair (or answer), in the dtype of their arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return -(1 - ε) log σ(margin) - ε log σ(-margin) (Mitchell, 2023, "A note on DPO with noisy preferences")."""
    if not label_smoothing:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def dpo(difference: Tensor, loss: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of `difference`: the chosen answer's log-ratio to the reference minus the rejected one's.

    Args:
        loss: sigmoid (Rafailov et al., 2023, equation 7), ipo (Azar et al., 2023, equation 17), hinge (Liu et al.,
            2023, "Statistical Rejection Sampling Improves Preference Optimization") or robust (Ray Chowdhury et al.,
            2024, "Provably Robust DPO").
    """
    margin = beta * difference
    if loss == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return F.relu(1 - margin)
    if loss == "robust":
        flipped = label_smoothing * F.logsigmoid(-margin)
        return (flipped - (1 - label_smoothing) * F.logsigmoid(margin)) / (1 - 2 * label_smoothing)
    return smoothed(margin, label_smoothing)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log σ(log odds ratio) of two mean log-probabilities (Hong et al., 2024, "ORPO", equations 4 and 7)."""
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_p: Tensor) -> Tensor:
    """Return log p - log(1 - p); finite up to the largest p below 1."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)  # p = 1 has infinite odds
    return log_p - torch.log(-torch.expm1(log_p))


def kto(gain: Tensor, baseline: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """Return 1 - σ(β (gain - baseline)) of desirable answers, 1 - σ(β (baseline - gain)) of others.

    Ethayarajh et al., 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equation 7, without the weights.

    Args:
        gain: log-ratio of each answer to the reference.
        baseline: scalar, the estimate of KL(policy ‖ reference).
        desirable: 1 or 0.
    """
    sign = 2 * desirable - 1
    return 1 - (sign * beta * (gain - baseline)).sigmoid()
