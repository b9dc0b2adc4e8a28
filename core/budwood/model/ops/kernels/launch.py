"""Launches of the kernels: shapes, strides and block sizes. Whether they may be launched is decided before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from budwood.model.ops.kernels import triton_code as code

BLOCK = 1024
"""Elements that a program of an element-wise kernel computes."""
CLASSES = 4096
"""Logits that a program of the cross-entropy reads at once."""
KINDS = {"silu": 0, "gelu_tanh": 1}
EXACT = {"enable_fp_fusion": False}


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code_4bit: Tensor,
    share: int,
    nested: tuple[Tensor, Tensor, Tensor, int] | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights of a 4-bit tensor as bitsandbytes packs it.

    Args:
        packed: uint8, two weights each.
        absmax: scales of `share` weights each: fp32, or uint8 if they are quantised too.
        code_4bit: [16] fp32, the values of the codes.
        share: weights per scale.
        nested: of quantised scales: their code [256] fp32, their scales fp32, the offset [] fp32, and scales per scale.
        shape: of the result.
        dtype: of the result.
    """
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    nested_code, nested_absmax, offset, nested_share = nested or (code_4bit, absmax, absmax, 1)
    grid = (triton.cdiv(out.numel(), 2 * BLOCK),)
    code.dequantize_4bit[grid](
        packed, absmax, nested_code, nested_absmax, offset, code_4bit, out, out.numel(),
        NESTED=nested is not None, SHARE=share, NESTED_SHARE=nested_share, BLOCK=BLOCK, **EXACT,
    )  # fmt: skip
    return out


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of contiguous `x` [..., d], and the fp32 scale of each row."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        code.rms_norm_forward[(rows,)](x, weight, out, scales, width, epsilon, **_row(width), **EXACT)
    return out, scales


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Return the gradient of x, from that of the norm, both contiguous [..., d]."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    if len(scales):
        code.rms_norm_backward[(len(scales),)](gradient, x, weight, scales, out, width, **_row(width), **EXACT)
    return out


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return activation(gate) · up; both contiguous and of one shape and dtype."""
    out = torch.empty_like(gate)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        code.gated_forward[grid](gate, up, out, gate.numel(), KIND=KINDS[kind], BLOCK=BLOCK, **EXACT)
    return out


def gated_backward(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    gates, ups = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        code.gated_backward[grid](
            gradient, gate, up, gates, ups, gate.numel(), KIND=KINDS[kind], BLOCK=BLOCK, **EXACT
        )  # fmt: skip
    return gates, ups


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool = False) -> Tensor:
    """Return `x` [batch, heads, tokens, d], of any strides but the last, with its first elements rotated.

    Args:
        cosine: [batch or 1, tokens, r], r ≤ d even, contiguous.
        sine: likewise.
        backward: rotate the other way, as a gradient is.
    """
    batch, heads, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    rotated = cosine.shape[-1]
    table = cosine.stride(0) if cosine.shape[0] > 1 else 0
    block = triton.next_power_of_2(max(rotated // 2, width - rotated))
    code.rotate[(tokens, heads, batch)](
        x, cosine, sine, out, tokens, heads, rotated, width, *x.stride()[:3], table, cosine.stride(1),
        BACKWARD=backward, BLOCK=block, num_warps=1, **EXACT,
    )  # fmt: skip
    return out


def cross_entropy_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fp32 losses of contiguous `logits` [n, V], and the logarithms of the sums of exponentials [n]."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(losses)
    if len(logits):
        code.cross_entropy_forward[(len(logits),)](
            logits, labels, losses, sums, logits.shape[-1], BLOCK=CLASSES, num_warps=8, **EXACT
        )
    return losses, sums


def cross_entropy_backward(gradient: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    """Return the gradient of the logits [n, V], from that of the losses [n] fp32."""
    out = torch.empty_like(logits)
    if len(logits):
        grid = (len(logits), triton.cdiv(logits.shape[-1], CLASSES))
        code.cross_entropy_backward[grid](
            gradient, logits, labels, sums, out, logits.shape[-1], BLOCK=CLASSES, num_warps=8, **EXACT
        )
    return out


def _row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
