"""What both halves of a layer have: norms, two groups of linears, and the sum with their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood.model.ops.group import Group


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside its input.

    Attributes:
        shape: of the input, [rows, tokens, d].
        options: keyword arguments of the attention.
        autocast: returns the context in which the model computes.
        rows: [L] int64, the only rows of the flattened input of which the output is wanted; None: all.
    """

    shape: torch.Size
    options: dict[str, Any]
    autocast: Callable[[], Any]
    rows: Tensor | None = None


@dataclass(frozen=True)
class Half:
    """One pass of a half.

    Attributes:
        norm, after: the norm of the input, and that of the output or None.
        inputs, output: the projections of the input, and that of the result.
    """

    norm: nn.Module
    after: nn.Module | None
    inputs: Group
    output: Group

    @property
    def tensors(self) -> int:
        """The number of tensors with gradients."""
        return self.inputs.tensors + self.output.tensors

    def weights(self) -> list[list[Tensor]]:
        """Return the weights of both groups, for a recomputation and the backward pass after it."""
        return [self.inputs.weights(), self.output.weights()]
