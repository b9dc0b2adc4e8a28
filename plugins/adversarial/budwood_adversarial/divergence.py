"""Divergences between the distributions of clean and noisy logits, in nats, for each label.

Each is one autograd function that finds its gradient in the forward, in closed form, a few rows at a time: composed of
softmaxes and products it would keep, and go through, five tensors as large as the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 19
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
    """apply(clean, noisy, symmetric). With d = log p − log q, the gradients in the logits a of p and b of q are

    KL(p‖q): p (d − KL(p‖q)) in a, q − p in b; KL(q‖p): p − q in a, −q (d + KL(q‖p)) in b.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, noisy: Tensor, symmetric: bool) -> Tensor:
        wants_clean, wants_noisy, _ = ctx.needs_input_grad
        values = torch.empty(len(clean), device=clean.device)
        grad_clean = torch.empty_like(clean, dtype=torch.float32) if wants_clean else None
        grad_noisy = torch.empty_like(noisy, dtype=torch.float32) if wants_noisy else None
        rows = max(1, BLOCK // clean.shape[-1]) if clean.device.type == "cpu" else max(1, len(clean))
        for start in range(0, len(clean), rows):
            part = slice(start, start + rows)
            log_p, log_q = clean[part].float().log_softmax(-1), noisy[part].float().log_softmax(-1)
            d = log_p - log_q
            p, q = log_p.exp_(), log_q.exp_()
            forward = torch.linalg.vecdot(p, d)
            backward = -torch.linalg.vecdot(q, d) if symmetric else None
            values[part] = forward if backward is None else forward + backward
            if grad_noisy is not None:
                torch.sub(q, p, out=grad_noisy[part])
                if backward is not None:
                    grad_noisy[part].addcmul_(q, d + backward[:, None], value=-1.0)
            if grad_clean is not None:
                torch.mul(p, d - forward[:, None], out=grad_clean[part])
                if symmetric:
                    grad_clean[part].add_(p).sub_(q)
        ctx.save_for_backward(grad_clean, grad_noisy)
        ctx.dtypes = clean.dtype, noisy.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scale = gradients[0][:, None]
        clean, noisy = (
            None if found is None else (found * scale).to(dtype)
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return clean, noisy, None
