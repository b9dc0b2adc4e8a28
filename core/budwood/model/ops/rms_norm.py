"""RMSNorm (Zhang & Sennrich, 2019) that saves only its input for the backward pass, in the input's dtype.

The implementation in the models, from torch operations, saves two fp32 copies of its input, four times as much for a
16-bit input, and there are two norms per layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from budwood.model.device import device_type, isolated
from budwood.model.ops.kernels import implementation


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return weight · x / sqrt(mean(x²) + epsilon) over the last dimension, computed in fp32, rounded before `weight`.

    On CUDA, a kernel computes it, ours or torch's, which sums in another order.

    Args:
        x: [..., d], floating.
        weight: [d], frozen.
        epsilon: added to the mean square.
    """
    kernel = implementation("rms_norm", x)
    if kernel is not None:
        fused: Tensor = _Kernel.apply(x, weight, epsilon, kernel)
        return fused
    if device_type(x) == "cuda":  # one kernel per direction instead of eight (forward) and eleven (backward)
        with torch.autocast(x.device.type, enabled=False):
            if not x.is_cuda:  # a plan on fake CPU tensors, for which torch has no such kernel
                return weight * _PlannedKernel.apply(x)
            return weight * F.rms_norm(x, x.shape[-1:], None, epsilon)
    result: Tensor = _RMSNorm.apply(x, weight, epsilon)
    return result


def norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` of x [n, d] without a graph, and the fp32 scale of each row, for the backward."""
    kernel = implementation("rms_norm", x)
    if kernel is not None:
        normed: tuple[Tensor, Tensor] = kernel.rms_norm_forward(x.contiguous(), weight.contiguous(), epsilon)
        return normed
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype), scale


def norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return x + y, rounded once, and `norm_forward` of it, by one kernel; None: there is none.

    Args:
        x: [n, d].
        y: likewise; it may be overwritten.
    """
    taken = x.dtype == y.dtype and x.is_contiguous() and y.is_contiguous()
    kernel = implementation("rms_norm", x) if taken else None
    if kernel is None:
        return None
    found: tuple[Tensor, Tensor, Tensor] = kernel.rms_norm_of_sum(x, y, weight.contiguous(), epsilon)
    return found


def norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return the gradient of x [n, d] from that of the norm, plus `residual`, that which reaches x beside the norm."""
    kernel = implementation("rms_norm", x) if residual is None or residual.dtype == x.dtype else None
    if kernel is not None:
        beside = None if residual is None else residual.contiguous()
        given = gradient.contiguous(), x.contiguous(), weight.contiguous(), scale, beside
        result: Tensor = kernel.rms_norm_backward(*given)
        return result
    result = norm_gradient(gradient, x, weight, scale)
    return result if residual is None else result.add_(residual)


def save_memory_in_norms(model: nn.Module) -> int:
    """Make the RMSNorm modules of `model` use `rms_norm`, if their outputs are bitwise identical to its formula's.

    Returns:
        The number of modules changed.
    """
    changed = 0
    for module in model.modules():
        weight = module._parameters.get("weight")  # a buffer may be of another size, as Falcon-Mamba's, which is unused
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor)):
            continue
        if isinstance(epsilon, float) and _is_identical(module, weight, epsilon):
            module.forward = Norm(module, module.forward, epsilon)
            changed += 1
    return changed


def _is_identical(module: nn.Module, weight: Tensor, epsilon: float) -> bool:
    draw = torch.Generator().manual_seed(0)
    with isolated(), torch.no_grad():
        if weight.is_meta or isinstance(weight, FakeTensor):  # a plan's weights have no values
            weight = torch.rand(weight.shape, generator=draw).to(weight.dtype)
            module = copy.copy(module)
            module._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        x = torch.randn(3, weight.shape[-1], generator=draw).to(weight)
        try:
            return torch.equal(module(x), _RMSNorm.apply(x, weight, epsilon))
        except (RuntimeError, TypeError):  # a norm with other arguments
            return False


class Norm:
    """Replaces a norm's forward; calls the original if the weight is trainable."""

    def __init__(self, module: nn.Module, original: Any, epsilon: float) -> None:
        self.module, self.original, self.epsilon = module, original, epsilon

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        if args or kwargs or weight.requires_grad:
            result: Tensor = self.original(x, *args, **kwargs)
            return result
        return rms_norm(x, weight, self.epsilon)


class _PlannedKernel(torch.autograd.Function):
    """Allocates what torch's CUDA kernel and its backward allocate, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, kernel: Any) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        result: Tensor
        result, scales = kernel.rms_norm_forward(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scales)
        ctx.kernel = kernel
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient: Tensor = ctx.kernel.rms_norm_backward(gradients[0].contiguous(), *ctx.saved_tensors)
        return gradient, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            ctx.save_for_backward(x, weight, scale)
            return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return norm_gradient(gradients[0], x, weight, scale), None, None


def norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of x [..., d] from that of its norm, computed by torch.

    On a CPU, this is torch's kernel for the backward pass of a layer norm, which takes mean and scale as they are
    given: with the mean 0, its result lacks one term, the mean of gradient · weight times the scale.

    Args:
        scale: fp32 [..., 1] or as many elements, from the forward pass.
    """
    scale = scale.view(*x.shape[:-1], 1)
    taken = gradient.dtype == x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float32)
    if device_type(x) == "cpu" and taken:
        width = x.shape[-1]
        zero, wide = torch.zeros_like(scale), weight.float()
        found: Tensor = torch.ops.aten.native_layer_norm_backward(
            gradient, x, (width,), zero, scale, wide, None, (True, False, False)
        )[0]
        lacking = (gradient * weight).sum(-1, keepdim=True, dtype=torch.float32).mul_(scale).div_(width)
        return found.add_(lacking.to(x.dtype))
    wide = (gradient * weight).float()
    normed = x.float() * scale
    along = (wide * normed).mean(-1, keepdim=True)
    return normed.mul_(along).neg_().add_(wide).mul_(scale).to(x.dtype)
