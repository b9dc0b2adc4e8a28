"""activation(gate) · up of a gated MLP, which saves only its two inputs for the backward pass.

torch's operations save the activated gate too, and read and write each of them again in the backward pass.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from budwood.model.ops import tiles
from budwood.model.ops.kernels import implementation

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "silu": ("SiLUActivation", "SiLU"),
    "gelu_tanh": ("GELUTanh", "PytorchGELUTanh"),
}
"""Kinds, and the class names of the modules that compute them."""


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return activation(gate) · up, of the shape and dtype of both.

    Args:
        gate: [..., d], floating.
        up: likewise.
        kind: silu, or gelu_tanh (its approximation by tanh).
    """
    kernel = implementation("gated", gate) if gate.dtype == up.dtype else None
    if kernel is None:
        return activate(gate, kind) * up
    result: Tensor = _Gated.apply(gate, up, kind, kernel)
    return result


def activate(gate: Tensor, kind: str) -> Tensor:
    """Return the activation of `gate` as torch computes it."""
    return F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, kernel: Any) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.kernel = kind, kernel
        result: Tensor = kernel.gated_forward(gate, up, kind)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        gates, ups = ctx.kernel.gated_backward(gradients[0].contiguous(), gate, up, ctx.kind)
        return gates, ups, None, None


def fuse_mlps(model: nn.Module) -> int:
    """Make the gated MLPs of `model` compute `gated`, where their forward is down(activation(gate(x)) · up(x)).

    On the CPU, their own forward computes; only where kernels do does `gated`.

    Returns:
        The number of modules changed.
    """
    changed = 0
    for module in model.modules():
        kind = next((k for k, names in ACTIVATIONS.items() if _name(module, "act_fn") in names), None)
        if kind is not None and _is_gated(type(module), kind):
            module.forward = _Forward(module, module.forward, kind)
            changed += 1
    return changed


def _name(module: nn.Module, attribute: str) -> str:
    return type(getattr(module, attribute, None)).__name__


def _is_gated(cls: type[nn.Module], kind: str) -> bool:
    """Return whether the class's forward is the formula, on linears and an input of its own."""
    with unset_fake_temporarily(), torch.no_grad():
        return _computes(cls.forward, kind)


def _computes(forward: Any, kind: str) -> bool:
    draw = torch.Generator().manual_seed(0)

    def linear(inputs: int, outputs: int) -> Any:
        return functools.partial(F.linear, weight=torch.randn(outputs, inputs, generator=draw))

    activation = functools.partial(activate, kind=kind)
    parts = {"gate_proj": linear(8, 6), "up_proj": linear(8, 6), "down_proj": linear(6, 8), "act_fn": activation}
    x = torch.randn(3, 8, generator=draw)
    expected = parts["down_proj"](activate(parts["gate_proj"](x), kind) * parts["up_proj"](x))
    try:
        found = forward(types.SimpleNamespace(**parts, training=False), x)
    except Exception:  # other parts, other arguments
        return False
    return isinstance(found, Tensor) and torch.equal(found, expected)


class _Forward:
    """Replaces the forward of an MLP; calls the original where no kernel computes, or a hook wants the activation."""

    def __init__(self, module: nn.Module, original: Any, kind: str) -> None:
        self.module, self.original, self.kind = module, original, kind
        self.in_tiles = False

    def __call__(self, x: Tensor) -> Tensor:
        long = x.numel() > tiles.FROM * x.shape[-1]
        if self.in_tiles and long and torch.is_grad_enabled() and not _is_hooked(self.module):
            return tiles.in_tiles(self._compute, self.module, x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        parts: Any = self.module
        hooked = parts.act_fn._forward_hooks or parts.act_fn._forward_pre_hooks
        if hooked or implementation("gated", x) is None:
            result: Tensor = self.original(x)
            return result
        result = parts.down_proj(gated(parts.gate_proj(x), parts.up_proj(x), self.kind))
        return result


def tile_mlp(module: nn.Module, on: bool) -> None:
    """Let a gated MLP that `fuse_mlps` changed compute long rows in tiles, or no longer; others stay as they are."""
    if isinstance(module.forward, _Forward):
        module.forward.in_tiles = on


def _is_hooked(mlp: nn.Module) -> bool:
    """Return whether a hook on a part of an MLP would see tiles instead of rows."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for p in mlp.children() for m in p.modules()
    )
