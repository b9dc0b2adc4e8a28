"""Importance scores of singular triplets, and the selection of those to keep (Zhang et al., 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Importance:
    """Moving averages of the sensitivity of parameters and of its uncertainty.

    Attributes:
        sensitivity: Ī of each parameter, in the parameter's shape, fp32 (eq. 9).
        uncertainty: Ū of each parameter (eq. 10).
    """

    def __init__(self, parameters: Sequence[Tensor], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.uncertainty = [torch.zeros_like(p, requires_grad=False) for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        """Update with the sensitivity I = |w · ∂L/∂w| (eq. 8) of one step, from the fully accumulated gradients."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        now = torch._foreach_abs(torch._foreach_mul(list(parameters), gradients))
        torch._foreach_lerp_(self.sensitivity, now, 1 - self.beta1)
        torch._foreach_sub_(now, self.sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.uncertainty, now, 1 - self.beta2)

    def scores(self) -> list[Tensor]:
        """Return the score S [r] of every triplet of each update, with s = Ī · Ū (eq. 11).

        The parameters come in threes: A [r, in], B [out, r], E [r, 1]. A triplet's score is that of its singular value
        plus the means over its right and its left vector.
        """
        s = torch._foreach_mul(self.sensitivity, self.uncertainty)
        return [e[:, 0] + a.mean(1) + b.mean(0) for a, b, e in zip(s[0::3], s[1::3], s[2::3], strict=True)]


def choose(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Return a mask [r] per update: True for the `budget` triplets with the highest scores.

    Exactly `budget` are kept: of equal scores the first ones, which is the same on every process.
    """
    combined = torch.cat(list(scores))
    keep = torch.zeros(len(combined), dtype=torch.bool, device=combined.device)
    keep[torch.sort(combined, descending=True, stable=True).indices[:budget]] = True
    return list(keep.split([len(score) for score in scores]))
