"""Compares each kernel with torch's computation, on the device and in the dtype in which it is about to be used.

The first argument of a check is the module whose functions are compared: `launch` or `compiled`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Check = Callable[[Any, torch.device, torch.dtype], str]
NF4_CODES = 16
KINDS = ("silu", "gelu_tanh")
CLASSES = 4096 + 77
"""More than a program of the kernel reads at once."""


def _draw(device: torch.device, dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(tuple(shape), generator=draw).to(device, dtype) for shape in shapes]


def _compare(names: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Return what differs by more than two roundings of the largest value, or nothing."""
    for name, mine, theirs in zip(names.split(), found, expected, strict=True):
        bound = 2 * torch.finfo(mine.dtype).eps * max(1.0, theirs.abs().max().item())
        difference = (mine.double() - theirs.double()).abs().max().item()
        if not difference <= bound:
            return f"{name} differs by {difference:.1e} where rounding allows {bound:.1e}"
    return ""


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], above: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, above)


def _dequantize_4bit(ops: Any, device: torch.device, dtype: torch.dtype) -> str:
    draw = torch.Generator().manual_seed(0)
    size, share, nested_share = 3 * 4096 + 130, 64, 256
    packed = torch.randint(256, (size // 2,), generator=draw, dtype=torch.uint8)
    scales = torch.randint(256, (-(-size // share),), generator=draw, dtype=torch.uint8)
    code, nested_code = torch.randn(NF4_CODES, generator=draw), torch.randn(256, generator=draw)
    nested_absmax, offset = torch.rand(-(-len(scales) // nested_share), generator=draw), torch.tensor(0.3)
    wide = nested_code[scales.long()] * nested_absmax.repeat_interleave(nested_share)[: len(scales)] + offset
    nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).flatten().long()
    expected = (code[nibbles] * wide.repeat_interleave(share)[:size]).to(device, dtype)
    moved = [tensor.to(device) for tensor in (packed, scales, code, nested_code, nested_absmax, offset, wide)]
    packed, scales, code, nested_code, nested_absmax, offset, wide = moved
    nested = (nested_code, nested_absmax, offset, nested_share)
    found = [
        ops.dequantize_4bit(packed, scales, code, share, nested, (size,), dtype),
        ops.dequantize_4bit(packed, wide, code, share, None, (size,), dtype),
    ]
    rows, groups = (size // 2, 2), []
    for absmax, outer in ((scales, nested), (wide, None)):
        stored = (packed, absmax, code, share, outer, rows)
        groups += [ops.dequantize_4bit_group([stored] * count, dtype) for count in (2, 3)]
    several = [torch.cat([expected] * count).view(-1, 2) for count in (2, 3)]
    return _compare("nested plain two three two three", [*found, *groups], [expected, expected, *several, *several])


def _rms_norm(ops: Any, device: torch.device, dtype: torch.dtype) -> str:
    x, weight, above = _draw(device, dtype, (5, 96), (96,), (5, 96))

    def formula(x: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    out, scales = ops.rms_norm_forward(x, weight, 1e-5)
    gradient = ops.rms_norm_backward(above, x, weight, scales)
    summed = ops.rms_norm_backward(above, x, weight, scales, x)
    (expected,) = _gradients(formula, [x], above)
    total, normed, others = ops.rms_norm_of_sum(x, above.clone(), weight, 1e-5)
    again = ops.rms_norm_backward(above, x + above, weight, others)
    pairs = [
        (out, formula(x)), (gradient, expected), (summed, expected + x), (total, x + above),
        (normed, formula(x + above)), (again, _gradients(formula, [x + above], above)[0]),
    ]  # fmt: skip
    return _compare("norm gradient added sum normed again", *zip(*pairs, strict=True))


def _gated(ops: Any, device: torch.device, dtype: torch.dtype) -> str:
    from budwood.model.ops.gated import activate

    for kind in KINDS:
        gate, up, above = _draw(device, dtype, (7, 200), (7, 200), (7, 200))

        def formula(gate: Tensor, up: Tensor, kind: str = kind) -> Tensor:
            return activate(gate, kind) * up

        product = formula(gate, up)
        expected = [product, *_gradients(formula, [gate, up], above), product]
        whole = torch.cat((gate, up), -1)
        for (one, other), pair in (((gate, up), ()), (whole.chunk(2, -1), torch.empty_like(whole).chunk(2, -1))):
            forward = ops.gated_forward(one, other, kind)
            found = [forward, *ops.gated_backward(above, one, other, kind, True, pair)]
            difference = _compare("product gate up again", found, expected)
            if difference:
                return f"{kind}: {difference}"
        over = above.clone()
        found = list(ops.gated_backward(over, gate, up, kind, True, (gate, up), over))
        difference = _compare("gate up again", found, expected[1:])
        if difference:
            return f"{kind}, in place: {difference}"
    return ""


def _rotate(ops: Any, device: torch.device, dtype: torch.dtype) -> str:
    from budwood.model.ops.rotary import rotate

    for size, batches in itertools.product((16, 12), (2, 1)):
        whole, cosine, sine, above, other = _draw(
            device, dtype, (2, 5, 5, 16), (batches, 5, size), (batches, 5, size), (2, 3, 5, 16), (2, 2, 5, 16)
        )
        query, key = (part.transpose(1, 2) for part in whole.split((3, 2), 2))
        found = [*ops.rotate(query, key, cosine, sine), *ops.rotate(above, other, cosine, sine, backward=True)]
        expected = [rotate(x, cosine, sine) for x in (query, key)]
        for x, gradient in ((query, above), (key, other)):
            expected += _gradients(lambda x, c=cosine, s=sine: rotate(x, c, s), [x], gradient)
        difference = _compare("query key gradient gradient", found, expected)
        if difference:
            return difference
    return ""


def _cross_entropy(ops: Any, device: torch.device, dtype: torch.dtype) -> str:
    (logits,) = _draw(device, dtype, (3, CLASSES))
    labels = torch.tensor([0, CLASSES - 1, 5], device=device)
    above = torch.tensor([1.0, -0.5, 2.0], device=device)
    losses, sums = ops.cross_entropy_forward(logits, labels)
    gradient = ops.cross_entropy_backward(above, logits, labels, sums)
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    (wide,) = _gradients(lambda wide: F.cross_entropy(wide, labels, reduction="none"), [logits.float()], above)
    return _compare("loss gradient", [losses, gradient], [expected, wide.to(dtype)])


CHECKS: dict[str, Check] = {
    "dequantize_4bit": _dequantize_4bit,
    "rms_norm": _rms_norm,
    "gated": _gated,
    "rotate": _rotate,
    "cross_entropy": _cross_entropy,
}
"""Per kernel: returns what is wrong, or nothing."""
