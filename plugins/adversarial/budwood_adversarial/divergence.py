"""Divergences between the distributions of clean and noisy logits, in nats, for each label.

Each is one autograd function that finds its gradient in the forward, in closed form, a few rows at a time: composed of
softmaxes and products it would keep, and go through, five tensors as large as the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 18
"""Logits that are gone through at once on a CPU, so that what lies between two operations stays in its cache."""


def symmetric_kl(clean: Tensor, noisy: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) [n] fp32 of logits [n, V] (Jiang et al., 2020, section 3.1)."""
    values: Tensor = Divergence.apply(clean, noisy, True)
    return values


def kl(clean: Tensor, noisy: Tensor) -> Tensor:
    """KL(p‖q) [n] fp32 of logits [n, V], p a constant (Miyato et al., 2018, equation 5)."""
    values: Tensor = Divergence.apply(clean.detach(), noisy, False)
    return values


class Divergence(torch.autograd.Function):
    """apply(clean, noisy, symmetric), from logits a, b [n, V] of p, q. With d = a − b and means E over the vocabulary:

    KL(p‖q) = E_p d − log Σ exp a + log Σ exp b; its gradient in b is q − p;
    KL(p‖q) + KL(q‖p) = E_p d − E_q d; its gradients are p (d − E_p d) + p − q in a, −q (d − E_q d) + q − p in b.

    The clean side has a gradient with `symmetric` only.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, noisy: Tensor, symmetric: bool) -> Tensor:
        wants_clean, wants_noisy, _ = ctx.needs_input_grad
        values = torch.empty(len(clean), device=clean.device)
        grad_clean = torch.empty_like(clean, dtype=torch.float32) if wants_clean else None
        grad_noisy = torch.empty_like(noisy, dtype=torch.float32) if wants_noisy else None
        for part in _blocks(clean):
            a, b = clean[part].float(), noisy[part].float()
            p, q = a.softmax(-1), b.softmax(-1)
            d, difference = a - b, q - p
            if symmetric:
                values[part] = -torch.linalg.vecdot(difference, d)
            else:
                values[part] = torch.linalg.vecdot(p, d) - _log_sum(a, p) + _log_sum(b, q)
            if grad_clean is not None:
                rest = d - torch.linalg.vecdot(p, d)[:, None]
                torch.mul(p, rest, out=grad_clean[part]).sub_(difference)
            if grad_noisy is not None and symmetric:
                rest = d.sub_(torch.linalg.vecdot(q, d)[:, None])
                torch.addcmul(difference, q, rest, value=-1.0, out=grad_noisy[part])
            elif grad_noisy is not None:
                grad_noisy[part] = difference
        ctx.found = grad_clean, grad_noisy
        ctx.dtypes = clean.dtype, noisy.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scale, results = gradients[0][:, None], []
        for found, dtype in zip(ctx.found, ctx.dtypes, strict=True):
            result = None if found is None else torch.empty_like(found, dtype=dtype)
            if found is not None and result is not None:
                for part in _blocks(found):
                    result[part] = found[part] * scale[part]
            results.append(result)
        return results[0], results[1], None


def _log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """log Σ exp of logits whose softmax is known: the largest logit minus the log of its probability."""
    return logits.amax(-1) - probabilities.amax(-1).log()


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that are gone through at once; on a GPU all of them."""
    rows = max(1, BLOCK // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
