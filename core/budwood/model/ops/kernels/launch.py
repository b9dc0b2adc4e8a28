"""Launches of the kernels: shapes, strides and block sizes. Whether they may be launched is decided before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def dequantize_4bit_group(stored: Sequence[tuple[Any, ...]], dtype: torch.dtype) -> Tensor:
    """Return the weights [out, in] of up to three 4-bit tensors of one `in`, below each other.

    Args:
        stored: the arguments of `dequantize_4bit` but the last, of each; all quantised in the same way.
        dtype: of the result.
    """
    shapes = [shape for *_, shape in stored]
    out = torch.empty(sum(shape[0] for shape in shapes), shapes[0][1], dtype=dtype, device=stored[0][0].device)
    _, _, _, share, nested, _ = stored[0]
    arguments: list[Any] = []
    for packed, absmax, code_4bit, _, scales, shape in stored:
        nested_code, nested_absmax, offset, _ = scales or (code_4bit, absmax, absmax, 1)
        arguments += [packed, absmax, nested_code, nested_absmax, offset, code_4bit, shape[0] * shape[1]]
    for _ in range(3 - len(stored)):
        arguments += [*arguments[:6], 0]
    blocks = sum(triton.cdiv(size, 2 * BLOCK) for size in arguments[6::7])
    code.dequantize_4bit_group[(blocks,)](
        *arguments, out, NESTED=nested is not None, SHARE=share, NESTED_SHARE=nested[3] if nested else 1,
        BLOCK=BLOCK, **EXACT,
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


def rms_norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + y, its norm, and the fp32 scale of each row; all [..., d] of one dtype and contiguous.

    The sum is rounded once, and written over y.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        code.rms_norm_of_sum[(rows,)](x, y, weight, out, scales, width, epsilon, **_row(width), **EXACT)
    return y, out, scales


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Return the gradient of x, from that of the norm, both contiguous [..., d].

    Args:
        residual: the gradient that reaches x beside the norm, likewise, which is added.
    """
    width = x.shape[-1]
    out = torch.empty_like(x)
    if len(scales):
        code.rms_norm_backward[(len(scales),)](
            gradient, x, weight, scales, x if residual is None else residual, out, width,
            ADDS=residual is not None, **_row(width), **EXACT,
        )  # fmt: skip
    return out


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return activation(gate) · up; of one shape and dtype, both contiguous or halves of the rows of one tensor."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        width = gate.shape[-1]
        code.gated_forward[gate.numel() // width, triton.cdiv(width, BLOCK)](
            gate, up, out, width, _distance(gate), KIND=KINDS[kind], BLOCK=BLOCK, **EXACT
        )  # fmt: skip
    return out


def gated_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, kind: str, again: bool = False, pair: Sequence[Tensor] = (),
    product: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of gate and up, from the contiguous one of the product.

    Args:
        again: also return the product, third.
        pair: where the gradients are written, with the strides of gate and up, which they may be.
        product: where the product is written, which may be `gradient`.
    """
    gates, ups = pair or (torch.empty_like(gate), torch.empty_like(up))
    out = product if again else None
    if again and out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        width = gate.shape[-1]
        code.gated_backward[gate.numel() // width, triton.cdiv(width, BLOCK)](
            gradient, gate, up, gates, ups, gates if out is None else out, width, _distance(gate),
            AGAIN=again, KIND=KINDS[kind], BLOCK=BLOCK, **EXACT,
        )  # fmt: skip
    return gates, ups, out


def _distance(gate: Tensor) -> int:
    """Return the elements from one row to the next."""
    return gate.shape[-1] if gate.is_contiguous() else gate.stride(-2)


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Return two tensors, of any strides but the last, with their first elements rotated.

    Both are parts of one tensor, in which the heads of a token are next to each other, as attention takes them.

    Args:
        query: [batch, heads, tokens, d].
        key: [batch, any number of heads, tokens, d], in the same dtype.
        cosine: [batch or 1, tokens, r], r ≤ d even, contiguous.
        sine: likewise.
        backward: rotate the other way, as a gradient is.
    """
    batch, heads, tokens, width = query.shape
    more = key.shape[1]
    out = torch.empty(batch, tokens, heads + more, width, dtype=query.dtype, device=query.device)
    both = out[:, :, :heads].transpose(1, 2), out[:, :, heads:].transpose(1, 2)
    if not out.numel():
        return both
    rotated = cosine.shape[-1]
    table = cosine.stride(0) if cosine.shape[0] > 1 else 0
    block = triton.next_power_of_2(max(rotated // 2, width - rotated))
    code.rotate[(tokens, heads + more, batch)](
        query, key, cosine, sine, out, tokens, heads, more, rotated, width,
        *query.stride()[:3], *key.stride()[:3], table, cosine.stride(1),
        BACKWARD=backward, BLOCK=block, num_warps=1, **EXACT,
    )  # fmt: skip
    return both


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
