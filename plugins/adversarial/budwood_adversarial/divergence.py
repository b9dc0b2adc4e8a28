"""Divergences between the distributions of clean and noisy logits, in nats per label.

Each is one autograd function that computes value and gradient in closed form, a few rows at a time, and saves the
gradient in the dtype of the logits. Composed of softmaxes and products, it would save five fp32 tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from budwood import device_type

BLOCK = 1 << 18
"""Logits per block on a CPU, so that intermediate results stay in its cache."""


def symmetric_kl(clean: Tensor, noisy: Tensor) -> Tensor:
    """Return KL(p‖q) + KL(q‖p) [n] fp32 for logits [n, V] (Jiang et al., 2020, section 3.1)."""
    values: Tensor = Divergence.apply(clean, noisy, True)
    return values


def kl(clean: Tensor, noisy: Tensor) -> Tensor:
    """Return KL(p‖q) [n] fp32 for logits [n, V], with p a constant (Miyato et al., 2018, equation 5)."""
    values: Tensor = Divergence.apply(clean.detach(), noisy, False)
    return values


class Divergence(torch.autograd.Function):
    """apply(clean, noisy, symmetric), for logits a, b [n, V] of p, q. With d = a − b and means E over the vocabulary:

    KL(p‖q) = E_p d − log Σ exp a + log Σ exp b; its gradient in b is q − p;
    KL(p‖q) + KL(q‖p) = E_p d − E_q d; its gradients are p (d − E_p d) + p − q in a, −q (d − E_q d) + q − p in b.

    The clean side has a gradient only with `symmetric`.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, noisy: Tensor, symmetric: bool) -> Tensor:
        values = torch.empty(len(clean), device=clean.device)
        # The gradients are computed with the values, since they need the same softmaxes.
        gradients = [torch.empty_like(x) if ctx.needs_input_grad[i] else None for i, x in enumerate((clean, noisy))]
        for part in _blocks(clean):
            a, b = clean[part].float(), noisy[part].float()
            p, q, d = a.softmax(-1), b.softmax(-1), a - b
            along_p, difference = torch.linalg.vecdot(p, d), q - p
            if symmetric:
                along_q = torch.linalg.vecdot(q, d)
                values[part] = along_p - along_q
            else:
                values[part] = along_p + _log_sum(b, q) - _log_sum(a, p)
            if gradients[0] is not None:
                gradients[0][part] = (d - along_p[:, None]).mul_(p).sub_(difference)
            if gradients[1] is not None:
                if symmetric:
                    difference.addcmul_(q, d.sub_(along_q[:, None]), value=-1.0)
                gradients[1][part] = difference
        ctx.save_for_backward(*gradients)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scale = gradients[0][:, None]
        clean, noisy = (None if x is None else torch.mul(x, scale, out=torch.empty_like(x)) for x in ctx.saved_tensors)
        return clean, noisy, None


def _log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return log Σ exp of logits, given their softmax: the largest logit minus the log of its probability."""
    return logits.amax(-1) - probabilities.amax(-1).log()


def _blocks(logits: Tensor) -> list[slice]:
    """Return slices of rows for blockwise computation; one slice on a GPU."""
    rows = max(1, BLOCK // logits.shape[-1]) if device_type(logits) == "cpu" else max(1, len(logits))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
