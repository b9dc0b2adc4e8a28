"""The norms of a layer, of any kind, with a forward and a backward pass of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood.model.halves.kept import Kept
from budwood.model.ops.rms_norm import Norm, norm_backward, norm_forward, norm_of_sum


@dataclass
class Ahead:
    """The norm with which a half begins, which one kernel computes with the sum at the end of the half before.

    Attributes:
        module: the norm.
        found: the sum [n, d], its norm, and the scale of each row, once they are computed; taken once.
    """

    module: nn.Module
    found: tuple[Tensor, Tensor, Tensor] | None = None


Links = tuple[Ahead | None, Ahead | None]


def added(x: Tensor, y: Tensor, fresh: bool, ahead: Ahead | None = None) -> Tensor:
    """Return x + y; `fresh`: y may be overwritten.

    The sum comes last, in one rounding: an update of an adapter that was added to x by itself would be lost in 16 bit
    where it is smaller than half a unit in x's last place.
    """
    own = ahead.module.forward if ahead is not None and fresh else None
    weight: Any = own.module.weight if isinstance(own, Norm) else None
    if ahead is not None and isinstance(own, Norm) and weight.device == x.device and not weight.requires_grad:
        ahead.found = norm_of_sum(x, y, weight, own.epsilon)
        if ahead.found is not None:
            return ahead.found[0]
    return y.add_(x) if fresh and x.dtype == y.dtype else x + y


def forward(
    module: nn.Module, name: str, x: Tensor, kept: Kept | None, autocast: Any, before: Ahead | None = None
) -> Tensor:
    """Return the norm of x [n, d].

    Args:
        name: under which the backward finds what it needs.
        kept: keeps it; None: there is no backward.
        autocast: returns the context in which the model computes.
        before: what was computed of it with the sum x.
    """
    own = module.forward
    if isinstance(own, Norm):
        total, normed, scale = before.found if before is not None and before.found is not None else (None, x, x)
        if before is not None:
            before.found = None
        if total is not x:
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
