"""What a half keeps from its forward to its backward pass, and graphs inside of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from budwood.model.ops.group import Made


@dataclass
class Kept:
    """Tensors by name, and where graphs inside of a half begin.

    A tensor with a graph keeps what its own backward pass needs. Autograd frees it with the other saved tensors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    edges: dict[str, list[GradientEdge]] = field(default_factory=dict)

    def put(self, name: str, tensor: Tensor | None) -> None:
        """Keep a tensor, or nothing."""
        if tensor is not None:
            self.tensors[name] = tensor

    def get(self, name: str) -> Tensor | None:
        """Return what was kept under a name."""
        return self.tensors.get(name)

    def put_made(self, name: str, made: Made) -> None:
        """Keep what a group's backward pass needs."""
        self.put(f"{name} narrow", made.narrow)
        for i, mask in enumerate(made.masks):
            self.put(f"{name} mask {i}", mask)

    def get_made(self, name: str) -> Made:
        """Return what `put_made` kept."""
        masks = [tensor for key, tensor in self.tensors.items() if key.startswith(f"{name} mask ")]
        return Made(self.get(f"{name} narrow"), masks)

    def put_list(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Keep several tensors, of which some may be None."""
        for i, tensor in enumerate(tensors):
            self.put(f"{name} {i}", tensor)

    def get_list(self, name: str, count: int) -> list[Tensor | None]:
        """Return `count` tensors that `put_list` kept."""
        return [self.get(f"{name} {i}") for i in range(count)]

    def enter(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors as the beginning of a graph, which does not keep them unless it needs them."""
        anchor = torch.empty(0, requires_grad=True, device=tensors[0].device)
        with torch.enable_grad():
            entered = list(_Enter.apply(anchor, *tensors))
        self.edges[name] = [get_gradient_edge(tensor) for tensor in entered]
        return entered

    def through(self, name: str, gradient: Tensor, last: bool) -> list[Tensor]:
        """Return the gradients of what `enter` returned, from that of the graph's result, kept under the same name.

        Args:
            last: the graph is not needed again.
        """
        result = self.tensors[name]
        edges = self.edges[name]
        found: Any = torch.autograd.grad(result, edges, gradient, retain_graph=not last)
        return list(found)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None, *(None for _ in gradients))
