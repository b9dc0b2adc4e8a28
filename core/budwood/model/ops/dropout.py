"""Dropout (Srivastava et al., 2014) that costs little on a CPU.

torch draws a random double for each element there, and multiplies by the mask element by element: dropout on the inputs
of all adapters took as long as the rest of a step. Here four elements share a random word of 64 bits, so a probability
is a multiple of 2⁻¹⁵, and a mask of -1 and 0 is combined with the bits of floating-point numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from budwood.model.device import device_type

LEVELS = 1 << 15
"""Values of the random bits of an element."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtypes with the bits of a floating-point number, by its size in bytes."""


def drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Return x with a random share of its elements 0, and the mask; to be multiplied by `drop_factor`.

    Args:
        x: floating.
        probability: that an element is 0, between 0 and 1.

    Returns:
        Two tensors of the shape of x, without a graph; the mask is for `drop_again`.
    """
    if not _is_drawn(x, probability):
        return torch.native_dropout(x, probability, True)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_()
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    bits.bitwise_and_(LEVELS - 1).neg_().add_(_dropped(probability) - 1).bitwise_right_shift_(15)
    mask = bits.to(torch.int8)
    return drop_again(x, mask, probability), mask


def drop_again(x: Tensor, mask: Tensor, probability: float) -> Tensor:
    """Return x, or the gradient of the result of `drop`, with its mask; to be multiplied by `drop_factor`.

    Args:
        x: of the shape, dtype and device of the x of `drop`.
    """
    if _is_drawn(x, probability):
        return (x.view(INTEGERS[x.element_size()]) & mask).view(x.dtype)
    result: Tensor = torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - probability))
    return result


def drop_factor(x: Tensor, probability: float) -> float:
    """Return what the results of `drop` and `drop_again` are to be multiplied by: 1 where a kernel has done so."""
    return LEVELS / (LEVELS - _dropped(probability)) if _is_drawn(x, probability) else 1.0


def dropout(x: Tensor, probability: float) -> Tensor:
    """Return x with dropout, as torch's function of this name in training."""
    if not probability:
        return x
    if not _is_drawn(x, probability):
        return F.dropout(x, probability)
    result: Tensor = _Dropout.apply(x, probability)
    return result


def draw_quickly(model: nn.Module) -> None:
    """Make the modules of `model` that are torch's `Dropout` compute `dropout`."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.forward = _Module(module)  # type: ignore[method-assign, assignment]


class _Module:
    """Replaces the forward of a `Dropout`."""

    def __init__(self, module: nn.Dropout) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return dropout(x, self.module.p) if self.module.training else x


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        result, mask = drop(x, probability)
        ctx.save_for_backward(mask)
        ctx.probability, ctx.factor = probability, drop_factor(x, probability)
        return result.mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return drop_again(gradients[0], ctx.saved_tensors[0], ctx.probability).mul_(ctx.factor), None


def _dropped(probability: float) -> int:
    """Return how many of the `LEVELS` are dropped."""
    return round(probability * LEVELS)


def _is_drawn(x: Tensor, probability: float) -> bool:
    """Return whether a mask is drawn here: on a CPU, if the share of what is rarer is within 1 % of what was asked."""
    error = abs(_dropped(probability) / LEVELS - probability)
    return device_type(x) == "cpu" and 0 < probability < 1 and 100 * error <= min(probability, 1 - probability)
