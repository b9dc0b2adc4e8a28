"""What the functions of `launch` allocate, on the fake tensors of a plan; nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def dequantize_4bit(packed: Tensor, *rest: Any) -> Tensor:
    shape: Sequence[int] = rest[-2]
    return packed.new_empty(tuple(shape), dtype=rest[-1])


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return out, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(x)


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return torch.empty_like(gate)


def gated_backward(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool = False) -> Tensor:
    return x.new_empty(x.shape)


def cross_entropy_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


def cross_entropy_backward(gradient: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    return torch.empty_like(logits)
