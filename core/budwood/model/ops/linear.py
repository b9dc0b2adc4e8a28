"""A frozen linear layer plus a low-rank update, as one autograd function: y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ.

With separate layers, autograd would save the input twice, the dequantised weight once, and casts of everything. This
function saves the input once and an [r, n] tensor, and dequantises W again in the backward pass. W has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from budwood.model.device import device_type
from budwood.model.ops.dropout import drop, drop_again, drop_factor
from budwood.model.quantizers import quantizer_of


def low_rank_linear(
    x: Tensor,
    base: nn.Linear,
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Return x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ in the compute dtype (that of autocast if enabled, or of `x`).

    Args:
        x: [..., in].
        base: a linear that has a quantiser (`quantizer_of`), with W and the bias.
        a: [r, in], any floating dtype, which its gradient has too. It need not be a leaf.
        b: [out, r], likewise.
        scaling: factor of the update.
        dropout: probability of dropping an element of the update's input; 0 outside of training.

    Returns:
        [..., out], no view, so that the caller may change it in place. With B = 0, it equals `frozen_linear(x, base)`.

    Raises:
        TypeError: `base` is not a linear.
        ValueError: the weight of `base` requires a gradient, which this function does not compute; or it is on another
            device than `x`, so a native kernel would access invalid memory.
    """
    return LowRankLinear.apply(x, base, a, b, getattr(base, "bias", None), scaling, dropout)


def frozen_linear(x: Tensor, base: nn.Linear) -> Tensor:
    """Return x Wᵀ + bias [..., out], computed like `low_rank_linear` without an update."""
    return LowRankLinear.apply(x, base, None, None, getattr(base, "bias", None), 1.0, 0.0)


def mixed_low_rank_linear(
    x: Tensor,
    base: nn.Linear,
    adapters: Sequence[tuple[Tensor, Tensor, float] | None],
    rows: Sequence[int],
) -> Tensor:
    """Apply a separate update to each row of a batch.

    Args:
        x: [R, ..., in].
        base: as in `low_rank_linear`.
        adapters: (A [r, in], B [out, r], scaling) each, of any ranks; None: no update.
        rows: [R] index of each row's adapter.

    Returns:
        [R, ..., out]. Rows without an update are bitwise identical to those of `frozen_linear` on the same batch.
    """
    y = frozen_linear(x, base)
    for index, weights in enumerate(adapters):
        chosen = [row for row, adapter in enumerate(rows) if adapter == index]
        if weights is not None and chosen:
            y = add_update(x, y, *cast_factors(*weights, y.dtype), torch.tensor(chosen, device=x.device))
    return y


@torch.no_grad()
def live_linear(
    x: Tensor, base: nn.Linear, a: Tensor | None = None, b: Tensor | None = None, scale: float = 1
) -> Tensor:
    """Return `low_rank_linear(x, base, a, b, scale)`, or `frozen_linear(x, base)`, bitwise, but without a graph.

    It saves the cost of an autograd function, which is noticeable in decoding.

    Args:
        x: [..., in].
        base: as in `low_rank_linear`.
        a: [r, in] in the compute dtype; None: no update.
        b: [out, r], likewise.
    """
    quantizer, kind = quantizer_of(base), x.device.type
    if quantizer is None:
        raise TypeError(f"live_linear: {type(base).__name__} is not a linear of any known quantiser")
    rows = x.reshape(-1, x.shape[-1])
    narrow = torch.is_autocast_enabled(kind)
    if narrow:
        rows = rows.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False) if narrow else nullcontext():
        y = quantizer.forward(base, rows, getattr(base, "bias", None))
        if a is not None and b is not None:
            y.addmm_(thin_product(rows, a.t()), b.t(), alpha=scale)
    return y.view(*x.shape[:-1], -1)


def cast_factors(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and scaling · B in `dtype`, for `add_update`."""
    return a.to(dtype), (b * scaling).to(dtype)


def add_update(x: Tensor, y: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """Add x Aᵀ Bᵀ to y [R, ..., out] in the rows [n] int64 of x [R, ..., in]."""
    all_rows = len(rows) == len(x)
    part = (x if all_rows else x.index_select(0, rows)).to(y.dtype)
    update = (thin_product(part.reshape(-1, part.shape[-1]), a.t()) @ b.t()).view(*part.shape[:-1], -1)
    return y + update if all_rows else y.index_add(0, rows, update)


class LowRankLinear(torch.autograd.Function):
    """The function behind `low_rank_linear`; apply(x, base, a, b, bias, scaling, dropout)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Linear,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        quantizer = quantizer_of(base)
        if quantizer is None:
            raise TypeError(f"low_rank_linear: {type(base).__name__} is not a linear of any known quantiser")
        weight = quantizer.weight(base)
        if weight.requires_grad:
            raise ValueError("low_rank_linear: the base's weight requires a gradient; freeze it")
        if weight.device != x.device:
            raise ValueError(f"low_rank_linear: the input is on {x.device}, the base's weight on {weight.device}")
        dtypes = [None if tensor is None else tensor.dtype for tensor in (x, a, b, bias)]
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        with torch.autocast(kind, enabled=False):
            # The reshaped and cast input is saved: a view of `x` if it already has the dtype.
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            y = quantizer.forward(base, rows, bias)
            narrow, mask = None, None
            if a is not None and b is not None:
                inner = rows
                if dropout > 0.0:
                    inner, mask = drop(rows, dropout)
                    scaling *= drop_factor(rows, dropout)
                a, b = a.to(dtype), b.to(dtype)  # saved for the backward: small, and saves a GPU kernel launch
                narrow = thin_product(inner, a.t())
                y.addmm_(narrow, b.t(), alpha=scaling)
        keeps_rows = a is not None and ctx.needs_input_grad[2]
        # Saved so that torch detects in-place changes before the backward, which reads W through the quantiser.
        dense = weight if ctx.needs_input_grad[0] and weight.is_floating_point() else None
        ctx.save_for_backward(rows if keeps_rows else None, narrow, a, b, mask, dense)
        ctx.base, ctx.shape, ctx.dtype, ctx.scaling, ctx.dropout = base, x.shape, dtype, scaling, dropout
        ctx.quantizer, ctx.dtypes = quantizer, dtypes
        # Not `view`: autograd forbids changing a view of a function's result in place, as Falcon's residual does.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, a, b, mask, _ = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, wants_bias, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_bias = None
        x_dtype, a_dtype, b_dtype, bias_dtype = ctx.dtypes
        with torch.autocast(gradients[0].device.type, enabled=False):
            gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).to(ctx.dtype)
            if wants_bias:
                grad_bias = gradient.sum(0, dtype=bias_dtype)
            grad_narrow = None
            if b is not None and (wants_x or wants_a):
                grad_narrow = thin_product(gradient, b, ctx.scaling)
            if wants_b:
                grad_b = thin_product(gradient.t(), narrow, ctx.scaling).to(b_dtype)
            if wants_a and grad_narrow is not None:
                inner = rows if mask is None else drop_again(rows, mask, ctx.dropout)
                grad_a = (grad_narrow.t() @ inner).to(a_dtype)
            if wants_x:
                grad_x = gradient @ ctx.quantizer.dequantized(ctx.base, ctx.dtype)
                if grad_narrow is not None and mask is None:
                    grad_x.addmm_(grad_narrow, a)
                elif grad_narrow is not None:
                    grad_x.add_(drop_again(grad_narrow @ a, mask, ctx.dropout))
                grad_x = grad_x.view(ctx.shape).to(x_dtype)
        return grad_x, None, grad_a, grad_b, grad_bias, None, None


def thin_product(wide: Tensor, thin: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale · wide [m, k] @ thin [k, r], with small r, in one operation and the device's fastest layout.

    oneDNN computes such products faster transposed, [r, m]. cuBLAS does not: its fast kernels need rows of a multiple
    of 8 elements, and m is arbitrary.
    """
    unused = wide.new_empty(1, 1)
    if _transposes(wide):
        return torch.addmm(unused, thin.t(), wide.t(), beta=0, alpha=scale).t()
    return torch.addmm(unused, wide, thin, beta=0, alpha=scale)


def _transposes(tensor: Tensor) -> bool:
    return device_type(tensor) == "cpu"
