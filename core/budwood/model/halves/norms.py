"""The norms of a layer, of any kind, with a forward and a backward pass of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from budwood.model.halves.kept import Kept
from budwood.model.ops.rms_norm import Norm, norm_backward, norm_forward


def forward(module: nn.Module, name: str, x: Tensor, kept: Kept | None, autocast: Any) -> Tensor:
    """Return the norm of x [n, d].

    Args:
        name: under which the backward finds what it needs.
        kept: keeps it; None: there is no backward.
        autocast: returns the context in which the model computes.
    """
    own = module.forward
    if isinstance(own, Norm):
        normed, scale = norm_forward(x, own.module.weight, own.epsilon)  # type: ignore[arg-type]
        if kept is not None:
            kept.put(f"{name} scale", scale)
        return normed
    if kept is None:
        with autocast():
            result: Tensor = own(x)
        return result
    (inside,) = kept.enter(name, [x])
    with torch.enable_grad(), autocast():
        result = own(inside)
    kept.put(name, result)
    return result.detach()


def backward(
    module: nn.Module, name: str, gradient: Tensor, x: Tensor, kept: Kept, last: bool, residual: Tensor | None = None
) -> Tensor:
    """Return the gradient of x [n, d] from that of the norm, plus `residual`, that which reaches x beside the norm."""
    own = module.forward
    if isinstance(own, Norm):
        scale = kept.tensors[f"{name} scale"]
        return norm_backward(gradient, x, own.module.weight, scale, residual)  # type: ignore[arg-type]
    (found,) = kept.through(name, gradient, last)
    return found if residual is None else found + residual
