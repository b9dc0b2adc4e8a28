"""Cross-entropy over a large vocabulary, in fp32, without a copy of the logits in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from budwood.model.device import device_type
from budwood.model.ops.kernels import implementation

CACHED = 1 << 19
"""fp32 elements in a block of rows, chosen such that a block stays in a core's cache between passes."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] of each row [n], in fp32 (fp64 if the logits are fp64).

    Args:
        logits: [n, V], floating.
        labels: [n] int64 in [0, V).
    """
    kernel = implementation("cross_entropy", logits)
    if kernel is None and device_type(logits) != "cpu":  # there, extra passes cost little
        return F.cross_entropy(_wide(logits), labels, reduction="none")
    values: Tensor = _CrossEntropy.apply(logits, labels) if kernel is None else _Kernel.apply(logits, labels, kernel)
    return values


class _CrossEntropy(torch.autograd.Function):
    """Processes blocks of rows, so that each pass reads the logits from memory once and writes the gradient once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return torch.cat(
            [-_wide(block).log_softmax(-1).gather(-1, where)[:, 0] for block, where in _blocks(logits, labels[:, None])]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        result = torch.empty_like(logits)
        for block, where, gradient, out in _blocks(logits, labels[:, None], gradients[0][:, None], result):
            difference = _wide(block).softmax(-1)
            difference.scatter_add_(-1, where, torch.full_like(gradient, -1.0))
            torch.mul(difference, gradient, out=out)
        return result, None


class _Kernel(torch.autograd.Function):
    """Reads the logits once in each direction, and writes their gradient once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, kernel: Any) -> Tensor:
        logits = logits.contiguous()
        losses, sums = kernel.cross_entropy_forward(logits, labels)
        ctx.save_for_backward(logits, labels, sums)
        ctx.kernel = kernel
        result: Tensor = losses
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        return ctx.kernel.cross_entropy_backward(gradient, *ctx.saved_tensors), None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the rows of all tensors into blocks, and yield them together."""
    rows = max(1, CACHED // max(1, logits.shape[-1]))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)
