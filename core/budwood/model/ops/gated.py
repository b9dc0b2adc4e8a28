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
from torch.autograd.function import once_differentiable

from budwood.model.device import isolated
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


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return `gated` without a graph, for gate and up [n, d], both contiguous or halves of the rows of one tensor."""
    kernel = implementation("gated", gate)
    if kernel is None:
        return activate(gate, kind).mul_(up)
    result: Tensor = kernel.gated_forward(gate, up, kind)
    return result


def gated_backward(
    gradient: Tensor, projected: list[Tensor], kind: str, again: bool, in_place: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Return the gradients of gate and up, and with `again` their `gated`.

    Args:
        gradient: of the product [n, d], contiguous.
        projected: gate and up [n, d], or one tensor [n, 2 d] of both, as the gradients are then too.
        in_place: the kernels may write over all of these.
    """
    gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)
    kernel = implementation("gated", gate)
    made = projected if in_place and kernel is not None else [torch.empty_like(tensor) for tensor in projected]
    pair = made if len(made) == 2 else list(made[0].chunk(2, -1))
    if kernel is not None:
        _, _, product = kernel.gated_backward(gradient, gate, up, kind, again, pair, gradient if in_place else None)
    else:
        active = activate(gate, kind)
        torch.mul(gradient, active, out=pair[1])
        product = active.mul_(up) if again else None
        through = gradient * up
        if kind == "silu":
            torch.ops.aten.silu_backward.grad_input(through, gate, grad_input=pair[0])
        else:
            torch.ops.aten.gelu_backward.grad_input(through, gate, approximate="tanh", grad_input=pair[0])
    return made, product


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
        gates, ups, _ = ctx.kernel.gated_backward(gradients[0].contiguous(), gate, up, ctx.kind)
        return gates, ups, None, None


def fuse_mlps(model: nn.Module) -> int:
    """Make the gated MLPs of `model` compute `gated`, where their forward is down(activation(gate(x)) · up(x)).

    One linear may compute gate and up, as in Phi-3. On the CPU, their own forward computes; only where kernels do does
    `gated`.

    Returns:
        The number of modules changed.
    """
    changed = 0
    for module in model.modules():
        act = next((name for name in ("act_fn", "activation_fn") if hasattr(module, name)), "")
        kind = next((k for k, names in ACTIVATIONS.items() if act and _name(module, act) in names), None)
        fused = hasattr(module, "gate_up_proj")
        if kind is not None and _is_gated(type(module), kind, act, fused):
            module.forward = GatedMLP(module, module.forward, kind, act, fused)
            changed += 1
    return changed


def _name(module: nn.Module, attribute: str) -> str:
    return type(getattr(module, attribute)).__name__


def _is_gated(cls: type[nn.Module], kind: str, act: str, fused: bool) -> bool:
    """Return whether the class's forward is the formula, on linears and an input of its own."""
    with isolated(), torch.no_grad():
        return _computes(cls.forward, kind, act, fused)


def _computes(forward: Any, kind: str, act: str, fused: bool) -> bool:
    draw = torch.Generator().manual_seed(0)

    def linear(inputs: int, outputs: int) -> Any:
        return functools.partial(F.linear, weight=torch.randn(outputs, inputs, generator=draw))

    parts = {"gate_up_proj": linear(8, 12)} if fused else {"gate_proj": linear(8, 6), "up_proj": linear(8, 6)}
    parts |= {"down_proj": linear(6, 8), act: functools.partial(activate, kind=kind)}
    x = torch.randn(3, 8, generator=draw)
    gate, up = parts["gate_up_proj"](x).chunk(2, -1) if fused else (parts["gate_proj"](x), parts["up_proj"](x))
    expected = parts["down_proj"](activate(gate, kind) * up)
    try:
        found = forward(types.SimpleNamespace(**parts, training=False), x)
    except Exception:  # other parts, other arguments
        return False
    return isinstance(found, Tensor) and torch.equal(found, expected)


class GatedMLP:
    """Replaces the forward of an MLP; calls the original where no kernel computes, or a hook wants the activation."""

    def __init__(self, module: nn.Module, original: Any, kind: str, act: str, fused: bool) -> None:
        self.module, self.original, self.kind, self.act, self.fused = module, original, kind, act, fused
        self.in_tiles = False

    def __call__(self, x: Tensor) -> Tensor:
        long = x.numel() > tiles.FROM * x.shape[-1]
        if self.in_tiles and long and torch.is_grad_enabled() and not _is_hooked(self.module):
            return tiles.in_tiles(self._compute, self.module, x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        parts: Any = self.module
        act = getattr(parts, self.act)
        hooked = act._forward_hooks or act._forward_pre_hooks
        if hooked or implementation("gated", x) is None:
            result: Tensor = self.original(x)
            return result
        gate, up = parts.gate_up_proj(x).chunk(2, -1) if self.fused else (parts.gate_proj(x), parts.up_proj(x))
        result = parts.down_proj(gated(gate, up, self.kind))
        return result


def tile_mlp(module: nn.Module, on: bool) -> None:
    """Let a gated MLP that `fuse_mlps` changed compute long rows in tiles, or no longer; others stay as they are."""
    if isinstance(module.forward, GatedMLP):
        module.forward.in_tiles = on


def _is_hooked(mlp: nn.Module) -> bool:
    """Return whether a hook on a part of an MLP would see tiles instead of rows."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for p in mlp.children() for m in p.modules()
    )
