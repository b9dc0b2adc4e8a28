"""What the functions of `launch` allocate, on the fake tensors of a plan, which sees one operation for most kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, share: int, nested: Any, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """See `launch`; under the name by which a plan knows what does not grow with the tokens."""
    scales = absmax if nested is None else nested[1]
    ops: Any = torch.ops.bitsandbytes
    result: Tensor = ops.dequantize_4bit.default(packed, scales, share, "nf4", list(shape), dtype)
    return result


def dequantize_4bit_group(stored: Sequence[tuple[Any, ...]], dtype: torch.dtype) -> Tensor:
    packed, absmax, code, share, nested, (_, inputs) = stored[0]
    rows = sum(shape[0] for *_, shape in stored)
    return dequantize_4bit(packed, absmax, code, share, nested, (rows, inputs), dtype)


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x * weight, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def rms_norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    return y.add_(x), out, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor, residual: Tensor | None = None
) -> Tensor:
    return (x + gradient).to(x.dtype)


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return gate * up


def gated_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, kind: str, again: bool = False, pair: Sequence[Tensor] = (),
    product: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    gates, ups = pair or (torch.empty_like(gate), torch.empty_like(up))
    torch.mul(gradient, up, out=gates)
    return gates, ups, (torch.empty_like(gradient) if product is None else product) if again else None


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    out = torch.cat((query.transpose(1, 2), key.transpose(1, 2)), 2)
    return out[:, :, : query.shape[1]].transpose(1, 2), out[:, :, query.shape[1] :].transpose(1, 2)


def cross_entropy_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.sum(-1, dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


def cross_entropy_backward(gradient: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    return logits * 2
