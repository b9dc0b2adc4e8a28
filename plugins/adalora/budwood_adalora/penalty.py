"""The penalty that keeps singular vectors orthogonal (Zhang et al., 2023, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def orthogonality(right: Sequence[Tensor], left: Sequence[Tensor]) -> Tensor:
    """Return Σ ‖A Aᵀ − I‖² over A [r, in] in `right` plus Σ ‖Bᵀ B − I‖² over B [out, r] in `left`, Frobenius norms.

    Returns:
        A scalar, fp32. Its gradient, 4 (A Aᵀ − I) A and 4 B (Bᵀ B − I), is computed with it. Matrices of equal shape
        are stacked, since otherwise the kernel launches would cost more than the computation.
    """
    total: Tensor = _Orthogonality.apply(len(right), *right, *left)
    return total


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *matrices: Tensor) -> Tensor:
        groups: dict[tuple[bool, torch.Size], list[int]] = {}
        for index, matrix in enumerate(matrices):
            groups.setdefault((index < count, matrix.shape), []).append(index)
        total = torch.zeros((), device=matrices[0].device)
        ctx.groups = []
        with torch.autocast(total.device.type, enabled=False):
            for (right, _), members in groups.items():
                x = torch.stack([matrices[i] for i in members]).float()
                gram = x @ x.mT if right else x.mT @ x
                gram.diagonal(dim1=1, dim2=2).sub_(1)
                total += gram.square().sum()
                ctx.groups.append((members, (gram @ x if right else x @ gram).mul_(4)))
        ctx.length = len(matrices)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * ctx.length
        for members, stack in ctx.groups:
            for index, gradient in zip(members, (stack * gradients[0]).unbind(0), strict=True):
                results[index] = gradient
        return None, *results
