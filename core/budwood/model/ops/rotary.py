"""Rotary position embeddings (RoPE; Su et al., 2021, eq. 34, on halves as in GPT-NeoX) in fewer operations.

The models compute x · cos + rotate_half(x) · sin with five operations and as many copies of x. Their modules call a
function of their file, `apply_rotary_pos_emb`, which is replaced by one that uses the kernels where they compute. On a
CPU without kernels it writes each half where it belongs, with the roundings and so the bits of the models' operations;
elsewhere it is the original.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from budwood.model.device import device_type, isolated
from budwood.model.ops.kernels import implementation

FUNCTION = "apply_rotary_pos_emb"
Pair = tuple[Tensor, Tensor]


def rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> Pair:
    """Return both tensors with their first r elements rotated: x · cos + rotate_half(x) · sin.

    Args:
        query: [batch, heads, tokens, d].
        key: [batch, heads or fewer, tokens, d].
        cosine: [batch or 1, tokens, r], r ≤ d even, frozen.
        sine: likewise.
    """
    same = query.dtype == key.dtype == cosine.dtype == sine.dtype and query.shape[-1] == key.shape[-1]
    kernel = implementation("rotate", query) if same else None
    if kernel is None and _in_halves(query, key, cosine, sine):
        return _Halves.apply(query, cosine, sine), _Halves.apply(key, cosine, sine)
    if kernel is None:
        return rotate(query, cosine, sine), rotate(key, cosine, sine)
    cosine, sine = cosine.contiguous(), sine.contiguous()
    both: Pair = _Rotate.apply(query, key, cosine, sine, kernel)
    return both


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return one of the tensors of `rotary`, computed by torch."""
    size = cosine.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _in_halves(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Whether both tensors are rotated whole, on a CPU and in one dtype."""
    same = query.dtype == key.dtype == cosine.dtype == sine.dtype and query.is_floating_point()
    return same and device_type(query) == "cpu" and query.shape[-1] == key.shape[-1] == cosine.shape[-1]


class _Halves(torch.autograd.Function):
    """Rotates a whole tensor; the gradient is laid out as its own gradient is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        (first, second), (sine_1, sine_2) = x.chunk(2, -1), sine[:, None].chunk(2, -1)
        out = x * cosine[:, None]
        one, two = out.chunk(2, -1)
        one.sub_(second * sine_1)
        two.add_(first * sine_2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (cosine, sine), (gradient,) = ctx.saved_tensors, gradients
        (first, second), (sine_1, sine_2) = gradient.chunk(2, -1), sine[:, None].chunk(2, -1)
        out = gradient * cosine[:, None]
        one, two = out.chunk(2, -1)
        one.add_(second * sine_2)
        two.sub_(first * sine_1)
        return out, None, None


class _Rotate(torch.autograd.Function):
    """Rotates query and key together."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, kernel: Any) -> Pair:
        ctx.save_for_backward(cosine, sine)
        ctx.kernel = kernel
        return _turned(kernel, query, key, cosine, sine, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None, None]:
        (above, other), (cosine, sine) = gradients, ctx.saved_tensors
        return *_turned(ctx.kernel, above, other, cosine, sine, True), None, None, None


def _turned(kernel: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Pair:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    both: Pair = kernel.rotate(query, key, cosine, sine, backward)
    return both


def fuse_rotations(model: nn.Module) -> int:
    """Make the attention modules of `model` compute `rotary`, where their file's function is its formula.

    Returns:
        The number of files whose function is replaced, now or before.
    """
    files = {type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Attention")}
    return sum(_replace(sys.modules.get(name)) for name in sorted(files))


def _replace(file: Any) -> bool:
    function = getattr(file, FUNCTION, None)
    if getattr(function, "budwood", False):
        return True
    if not callable(function) or not _is_formula(function, 8):
        return False
    partial = _is_formula(function, 4)

    @functools.wraps(function)
    def apply(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        usual = not args and not kwargs and cos.dim() == 3 and q.dim() == 4 and cos.shape[1] == q.shape[2]
        usual = usual and (partial or cos.shape[-1] == q.shape[-1])
        if usual and (implementation("rotate", q) is not None or _in_halves(q, k, cos, sin)):
            return rotary(q, k, cos, sin)
        return function(q, k, cos, sin, *args, **kwargs)

    apply.budwood = True  # type: ignore[attr-defined]
    setattr(file, FUNCTION, apply)
    return True


def _is_formula(function: Callable[..., Any], size: int) -> bool:
    with isolated():
        draw = torch.Generator().manual_seed(0)
        shapes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, size), (2, 5, size))
        query, key, cosine, sine = (torch.randn(shape, generator=draw) for shape in shapes)
        try:
            found = function(query, key, cosine, sine)
            return all(torch.equal(f, rotate(x, cosine, sine)) for f, x in zip(found, (query, key), strict=True))
        except Exception:  # other arguments
            return False
