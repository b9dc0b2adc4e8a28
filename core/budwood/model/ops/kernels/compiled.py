"""The functions of `launch` for a CPU, which inductor compiles to C++, each to one pass over memory.

torch alone computes each operation separately: a norm of 16-bit values reads or writes memory eleven times in its
backward pass. The arithmetic is fp32 between one reading and one rounding, so that results are as near to fp32's as
those of torch, or nearer. A C++ compiler is needed once for each function and dtype; torch keeps what was compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("rms_norm", "gated", "rotate", "cross_entropy")
"""The ops that are compiled."""

_Function = Callable[..., Any]


@functools.cache
def _compiled(function: _Function) -> _Function:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _run(function: _Function, *arguments: Any) -> Any:
    """Run a compiled function, without what it would be compiled again for: gradients, autocast, views of a tensor."""
    plain = [argument.data if isinstance(argument, Tensor) else argument for argument in arguments]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _compiled(function)(*plain)


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `launch`."""
    out, scales = _run(_norm, x.view(-1, x.shape[-1]), weight, epsilon)
    return out.view(x.shape), scales


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scales = torch.rsqrt(wide.square().mean(-1) + epsilon)
    normed = (wide * scales[:, None]).to(x.dtype)  # as the models round
    return weight * normed, scales


def rms_norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch`; y is left as it is."""
    flat = [t.view(-1, x.shape[-1]) for t in (x, y)]
    total, out, scales = _run(_sum_norm, *flat, weight, epsilon)
    return total.view(x.shape), out.view(x.shape), scales


def _sum_norm(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x.float() + y.float()).to(x.dtype)
    return total, *_norm(total, weight, epsilon)


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor, residual: Tensor | None = None
) -> Tensor:
    """See `launch`."""
    flat = [None if t is None else t.view(-1, x.shape[-1]) for t in (gradient, x, residual)]
    result: Tensor = _run(_norm_gradient, flat[0], flat[1], weight, scales, flat[2])
    return result.view(x.shape)


def _norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor, residual: Tensor | None) -> Tensor:
    wide = gradient.float() * weight.float()
    normed = x.float() * scales[:, None]
    found = (wide - normed * (wide * normed).mean(-1, keepdim=True)) * scales[:, None]
    return (found if residual is None else found + residual.float()).to(x.dtype)


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `launch`."""
    result: Tensor = _run(_gate, gate, up, kind)
    return result


def _gate(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    wide = gate.float()
    active = F.silu(wide) if kind == "silu" else F.gelu(wide, approximate="tanh")
    return (active * up.float()).to(gate.dtype)


def gated_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, kind: str, again: bool = False, pair: Sequence[Tensor] = (),
    product: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """See `launch`."""
    gates, ups, made = _run(_gate_gradients, gradient, gate, up, kind, again)
    if pair:
        gates, ups = pair[0].copy_(gates), pair[1].copy_(ups)
    return gates, ups, made if made is None or product is None else product.copy_(made)


def _gate_gradients(
    gradient: Tensor, gate: Tensor, up: Tensor, kind: str, again: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    wide, above, factor = gate.float(), gradient.float(), up.float()
    if kind == "silu":
        share = torch.sigmoid(wide)
        active, slope = wide * share, share * (1 + wide * (1 - share))
    else:
        active = F.gelu(wide, approximate="tanh")
        slope = torch.ops.aten.gelu_backward(torch.ones_like(wide), wide, approximate="tanh")
    product = (active * factor).to(gate.dtype) if again else None
    return (above * factor * slope).to(gate.dtype), (above * active).to(up.dtype), product


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """See `launch`; each result is a tensor of its own, with the heads of a token next to each other."""
    return _rotate(query, cosine, sine, backward), _rotate(key, cosine, sine, backward)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    batch, heads, tokens, width = x.shape
    rows = x.transpose(1, 2).reshape(batch * tokens, heads, width)
    tables = [table.expand(batch, -1, -1).reshape(batch * tokens, -1) for table in (cosine, sine)]
    result: Tensor = _run(_turn_back if backward else _turn, rows, *tables)
    return result.view(batch, tokens, heads, width).transpose(1, 2)


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second, rest, (cos, more_cos), (sin, more_sin) = _halves(x, cosine, sine)
    return _joined(x, first * cos - second * sin, second * more_cos + first * more_sin, rest)


def _turn_back(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second, rest, (cos, more_cos), (sin, more_sin) = _halves(x, cosine, sine)
    return _joined(x, first * cos + second * more_sin, second * more_cos - first * sin, rest)


def _halves(x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """Return the halves of what is rotated and the rest, and those of the tables, in fp32 for x [tokens, heads, d]."""
    size = cosine.shape[-1]
    first, second = x[..., : size // 2].float(), x[..., size // 2 : size].float()
    cos, sin = (table[:, None].float().chunk(2, -1) for table in (cosine, sine))
    return first, second, x[..., size:], cos, sin


def _joined(x: Tensor, first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([first.to(x.dtype), second.to(x.dtype), rest], -1)


def cross_entropy_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """See `launch`."""
    losses, sums = _run(_entropy, logits, labels)
    return losses, sums


def _entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)
    sums = (wide - largest).exp().sum(-1).log() + largest[:, 0]
    return sums - logits.gather(-1, labels[:, None])[:, 0].float(), sums


def cross_entropy_backward(gradient: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    """See `launch`."""
    result: Tensor = _run(_entropy_gradient, gradient, logits, labels, sums)
    return result


def _entropy_gradient(gradient: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    shares = (logits.float() - sums[:, None]).exp()
    chosen = torch.arange(logits.shape[-1]) == labels[:, None]
    return ((shares - chosen.float()) * gradient[:, None]).to(logits.dtype)
