"""A frozen linear layer plus a low-rank update, as one autograd function: y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ.

Composed of separate layers, the update keeps the input twice, the dequantised weight once, and casts of everything;
here the backward finds the input once and [r, n] numbers, and dequantises W anew. W gets no gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def low_rank_linear(
    x: Tensor,
    base: nn.Linear,
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Return x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ in the compute dtype (autocast's, else that of `x`).

    Args:
        x: [..., in].
        base: holds W [out, in] and the bias: nn.Linear, or bitsandbytes' Linear4bit or Linear8bitLt. Its own forward
            is not called on a 4-bit weight, so that bitsandbytes never repacks it.
        a: [r, in], of any floating dtype; its gradient comes back in that dtype. It need not be a leaf.
        b: [out, r], likewise.
        scaling: factor of the update.
        dropout: probability that an element of the update's input is dropped; 0 where the model does not train.

    Returns:
        [..., out]. With B = 0 they are the numbers of `frozen_linear(x, base)`.

    Raises:
        ValueError: the weight of `base` wants a gradient, which this function does not compute; or it is on another
            device than `x`, of which bitsandbytes would read memory that is not its own.
        RuntimeError: in the backward, a 4-bit weight that bitsandbytes has repacked for inference.
    """
    return LowRankLinear.apply(x, base, a, b, base.bias, scaling, dropout)


def frozen_linear(x: Tensor, base: nn.Linear) -> Tensor:
    """Return x Wᵀ + bias [..., out], as `low_rank_linear` computes it, without an update."""
    return LowRankLinear.apply(x, base, None, None, base.bias, 1.0, 0.0)


def mixed_low_rank_linear(
    x: Tensor,
    base: nn.Linear,
    adapters: Sequence[tuple[Tensor, Tensor, float] | None],
    rows: Sequence[int],
) -> Tensor:
    """Apply to each row of a batch its own update.

    Args:
        x: [R, ..., in].
        base: as in `low_rank_linear`.
        adapters: (A [r, in], B [out, r], scaling) each, of any ranks; None stands for no update.
        rows: for each of the R rows, the index of its adapter.

    Returns:
        [R, ..., out]. Rows without an update are, bit for bit, those of `frozen_linear` on the same batch.
    """
    y = frozen_linear(x, base)
    members: dict[int, list[int]] = {}
    for row, index in enumerate(rows):
        if adapters[index] is not None:
            members.setdefault(index, []).append(row)
    for index, chosen in members.items():
        a, b, scaling = adapters[index]  # type: ignore[misc]
        whole = len(chosen) == len(rows)
        where = torch.tensor(chosen, device=x.device)
        part = (x if whole else x.index_select(0, where)).to(y.dtype)
        narrow = _thin_product(part.reshape(-1, part.shape[-1]), a.to(y.dtype).t())
        update = (narrow @ (b * scaling).to(y.dtype).t()).view(*part.shape[:-1], -1)
        y = y + update if whole else y.index_add(0, where, update)
    return y


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
        if base.weight.requires_grad:
            raise ValueError("low_rank_linear: the base's weight wants a gradient; freeze it")
        if base.weight.device != x.device:
            raise ValueError(f"low_rank_linear: the input is on {x.device}, the base's weight on {base.weight.device}")
        dtypes = [None if tensor is None else tensor.dtype for tensor in (x, a, b, bias)]
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        with torch.autocast(kind, enabled=False):
            # The reshaped and cast input is what is kept: a view of `x` where its dtype is right already.
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            y = _base_forward(rows, base, bias)
            narrow, mask = None, None
            if a is not None and b is not None:
                inner = rows
                if dropout > 0.0:
                    inner, mask = torch.native_dropout(rows, dropout, True)
                a, b = a.to(dtype), b.to(dtype)  # kept for the backward: small, and a GPU feels each operation
                narrow = _thin_product(inner, a.t())
                y.addmm_(narrow, b.t(), alpha=scaling)
        keeps_rows = a is not None and ctx.needs_input_grad[2]
        dense = base.weight if ctx.needs_input_grad[0] and _quantization(base) is None else None
        ctx.save_for_backward(rows if keeps_rows else None, narrow, a, b, mask, dense)
        ctx.base, ctx.shape, ctx.dtype, ctx.scaling, ctx.dropout = base, x.shape, dtype, scaling, dropout
        ctx.dtypes = dtypes
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, a, b, mask, dense = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, wants_bias, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_bias = None
        x_dtype, a_dtype, b_dtype, bias_dtype = ctx.dtypes
        keep = 1.0 / (1.0 - ctx.dropout) if mask is not None else 1.0
        with torch.autocast(gradients[0].device.type, enabled=False):
            gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).to(ctx.dtype)
            if wants_bias:
                grad_bias = gradient.sum(0, dtype=bias_dtype)
            grad_narrow = None
            if b is not None and (wants_x or wants_a):
                grad_narrow = _thin_product(gradient, b, ctx.scaling)
            if wants_b:
                grad_b = _thin_product(gradient.t(), narrow, ctx.scaling).to(b_dtype)
            if wants_a and grad_narrow is not None:
                inner = rows if mask is None else torch.ops.aten.native_dropout_backward(rows, mask, keep)
                grad_a = (grad_narrow.t() @ inner).to(a_dtype)
            if wants_x:
                weight = _dequantize(ctx.base, ctx.dtype) if dense is None else dense.to(ctx.dtype)
                grad_x = gradient @ weight
                if grad_narrow is not None and mask is None:
                    grad_x.addmm_(grad_narrow, a)
                elif grad_narrow is not None:
                    through = grad_narrow @ a
                    grad_x.add_(torch.ops.aten.native_dropout_backward(through, mask, keep))
                grad_x = grad_x.view(ctx.shape).to(x_dtype)
        return grad_x, None, grad_a, grad_b, grad_bias, None, None


def _thin_product(wide: Tensor, thin: Tensor, scale: float = 1.0) -> Tensor:
    """scale · wide [m, k] @ thin [k, r], r small, in one operation; laid out as the device computes such products best.

    oneDNN: transposed, [r, m]. cuBLAS: not so: its fast kernels want rows of a multiple of 8 numbers, and m is any.
    """
    unused = wide.new_empty(1, 1)
    if _transposes(wide.device):
        return torch.addmm(unused, thin.t(), wide.t(), beta=0, alpha=scale).t()
    return torch.addmm(unused, wide, thin, beta=0, alpha=scale)


def _transposes(device: torch.device) -> bool:
    return device.type == "cpu"


def _quantization(base: nn.Linear) -> Literal["4bit", "8bit"] | None:
    """How bitsandbytes holds the weight; where bitsandbytes has not been imported (seconds), nothing is its module."""
    bnb = sys.modules.get("bitsandbytes")
    if bnb is None:
        return None
    return "4bit" if isinstance(base, bnb.nn.Linear4bit) else "8bit" if isinstance(base, bnb.nn.Linear8bitLt) else None


def _base_forward(rows: Tensor, base: Any, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias for rows [n, in], in their dtype: the base module's own numbers, in a fresh tensor."""
    kind = _quantization(base)
    if kind == "4bit":
        import bitsandbytes as bnb

        dtype = base.compute_dtype or rows.dtype
        bias = None if bias is None else bias.to(dtype)
        return bnb.matmul_4bit(rows.to(dtype), base.weight, base.weight.quant_state, bias=bias).to(rows.dtype)
    if kind == "8bit":
        result: Tensor = base(rows)
        return result
    return F.linear(rows, base.weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


def _dequantize(base: Any, dtype: torch.dtype) -> Tensor:
    """W [out, in] as the forward used it, in `dtype`: a temporary where the base is quantised."""
    kind = _quantization(base)
    if kind == "4bit":
        import bitsandbytes as bnb

        state = base.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes has repacked this 4-bit weight for inference; it has no gradient any more")
        absmax = state.absmax
        if state.nested:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            base.weight.data.view(-1, 1), absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
        )
        return weight
    if kind == "8bit":
        return base.state.CB.to(dtype).mul_(base.state.SCB.unsqueeze(1).mul(1.0 / 127.0))
    return base.weight.to(dtype)
