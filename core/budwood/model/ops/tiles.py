"""The MLP of a recomputed layer in tiles of rows, so that its temporaries do not grow with the length.

Each tile is computed once in the forward pass and once more in the backward pass, right before it is differentiated.
The layer's own recomputation stops before the MLP, which saves nothing but its input, so nothing is computed more often
than without tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from budwood.model.random_state import Draws

ROWS, FROM = 4096, 8192
"""Rows of a tile, and rows above which there are tiles. Dequantising a 4-bit base for each tile takes about 4 % of the
time of its products."""


def in_tiles(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    """Return `function(x)`, computed and differentiated in tiles of at most `ROWS` rows.

    The gradient of a parameter is the sum over tiles, and equals that without tiles up to rounding.

    Args:
        function: maps [1, n, d] to [1, n, e], each row by itself, with the parameters of `module`.
        x: [..., d].
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    anchor = x.new_empty(0, dtype=torch.float32, requires_grad=torch.is_grad_enabled())
    kept = _Keep.apply(x, anchor)
    result: Tensor = _Tiles.apply(x, kept, function, *trained)
    return result


class _Keep(torch.autograd.Function):
    """Saves `x` before the MLP computes: torch ends a recomputation where the last saved tensor is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, function: Any, *trained: Tensor) -> Tensor:
        kind = x.device.type
        ctx.keeper, ctx.function, ctx.trained = kept.grad_fn, function, trained
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.draws = []
        rows, y = x.reshape(1, -1, x.shape[-1]), None
        for start in range(0, rows.shape[1], ROWS):
            draws = Draws(x.device)
            ctx.draws.append(draws)
            with draws.first:
                part = function(rows[:, start : start + ROWS])
            y = part.new_empty(1, rows.shape[1], part.shape[-1]) if y is None else y
            y[:, start : start + ROWS] = part
        assert y is not None
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.keeper.saved_tensors
        wants_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        trained = [parameter for parameter, wants in zip(ctx.trained, wanted, strict=True) if wants]
        rows, gradient = (tensor.detach().reshape(1, -1, tensor.shape[-1]) for tensor in (x, gradients[0]))
        grad_x = torch.empty_like(rows) if wants_x else None
        sums: list[Tensor | None] = [None] * len(trained)
        for start, draws in zip(range(0, rows.shape[1], ROWS), ctx.draws, strict=True):
            part = rows[:, start : start + ROWS].requires_grad_(wants_x)
            with torch.enable_grad(), ctx.autocast, draws.again:
                y = ctx.function(part)
            inputs = [part, *trained] if wants_x else trained
            parts = list(torch.autograd.grad(y, inputs, gradient[:, start : start + ROWS], allow_unused=True))
            del y
            if grad_x is not None:
                grad_x[:, start : start + ROWS] = parts.pop(0)
            sums = [_sum(total, new) for total, new in zip(sums, parts, strict=True)]
        each = iter(sums)
        found = tuple(next(each) if wants else None for wants in wanted)
        return grad_x.view(x.shape) if grad_x is not None else None, None, None, *found


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    if total is None or new is None:
        return new if total is None else total
    return total.add_(new)
