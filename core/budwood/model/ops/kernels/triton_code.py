"""The kernels in Triton. Imported only where they are launched, since it imports Triton.

All of them compute in fp32 and take their dtypes from their pointers. A result is rounded where the models' own torch
operations round, so that on the same inputs the numbers are those of the model, up to the last bit of a function such
as `exp`. Products and sums are not fused into one rounding, for the same reason (`enable_fp_fusion` at the launch).
"""

# Triton reads annotations as types of its own.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dequantized(
    packed, absmax, nested_code, nested_absmax, offset, code, out, size, program,
    NESTED: tl.constexpr, SHARE: tl.constexpr, NESTED_SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of `size` weights: code[nibble] times the scale of its SHARE weights; high nibbles come first."""
    start = program.to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    byte = tl.load(packed + at, mask=2 * at < size, other=0).to(tl.int32)
    owner = 2 * at // SHARE
    scale = tl.load(absmax + owner, mask=2 * at < size, other=0)
    if NESTED:
        wide = tl.load(nested_absmax + owner // NESTED_SHARE, mask=2 * at < size, other=0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * wide + tl.load(offset)
    high = tl.load(code + (byte >> 4)) * scale
    low = tl.load(code + (byte & 15)) * scale
    to = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out + to, tl.interleave(high, low).to(out.dtype.element_ty), mask=to < size)


@triton.jit
def dequantize_4bit(
    packed, absmax, nested_code, nested_absmax, offset, code, out, size,
    NESTED: tl.constexpr, SHARE: tl.constexpr, NESTED_SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weights of one matrix."""
    _dequantized(
        packed, absmax, nested_code, nested_absmax, offset, code, out, size, tl.program_id(0),
        NESTED, SHARE, NESTED_SHARE, BLOCK,
    )  # fmt: skip


@triton.jit
def dequantize_4bit_group(
    packed_1, absmax_1, nested_code_1, nested_absmax_1, offset_1, code_1, size_1,
    packed_2, absmax_2, nested_code_2, nested_absmax_2, offset_2, code_2, size_2,
    packed_3, absmax_3, nested_code_3, nested_absmax_3, offset_3, code_3, size_3, out,
    NESTED: tl.constexpr, SHARE: tl.constexpr, NESTED_SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weights of up to three matrices one after the other."""
    program = tl.program_id(0)
    second = tl.cdiv(size_1, 2 * BLOCK)
    third = second + tl.cdiv(size_2, 2 * BLOCK)
    if program < second:
        _dequantized(
            packed_1, absmax_1, nested_code_1, nested_absmax_1, offset_1, code_1, out, size_1, program,
            NESTED, SHARE, NESTED_SHARE, BLOCK,
        )  # fmt: skip
    elif program < third:
        _dequantized(
            packed_2, absmax_2, nested_code_2, nested_absmax_2, offset_2, code_2, out + size_1, size_2,
            program - second, NESTED, SHARE, NESTED_SHARE, BLOCK,
        )  # fmt: skip
    else:
        _dequantized(
            packed_3, absmax_3, nested_code_3, nested_absmax_3, offset_3, code_3, out + size_1 + size_2, size_3,
            program - third, NESTED, SHARE, NESTED_SHARE, BLOCK,
        )  # fmt: skip


@triton.jit
def rms_norm_forward(x, weight, out, scales, width, epsilon, BLOCK: tl.constexpr):
    """Write weight · (x · s) of one row, and its s = 1 / sqrt(mean(x²) + epsilon)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    wide = tl.load(x + row * width + at, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    tl.store(scales + row, scale)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + at, (normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_of_sum(x, y, weight, out, scales, width, epsilon, BLOCK: tl.constexpr):
    """Write x + y of one row over y, and the norm of what was written as `rms_norm_forward` does."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    total = tl.load(x + row * width + at, mask=inside, other=0).to(tl.float32)
    total = (total + tl.load(y + row * width + at, mask=inside, other=0).to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + row * width + at, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    tl.store(scales + row, scale)
    normed = (wide * scale).to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + at, (normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(gradient, x, weight, scales, residual, out, width, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradient of one row of x; ADDS: plus that row of `residual`, rounded twice as torch does."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    scale = tl.load(scales + row)
    normed = tl.load(x + row * width + at, mask=inside, other=0).to(tl.float32) * scale
    factor = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    above = tl.load(gradient + row * width + at, mask=inside, other=0)
    above = (above.to(tl.float32) * factor).to(gradient.dtype.element_ty).to(tl.float32)
    along = tl.sum(above * normed, 0) / width
    result = ((above - normed * along) * scale).to(out.dtype.element_ty)
    if ADDS:
        beside = tl.load(residual + row * width + at, mask=inside, other=0).to(tl.float32)
        result = (result.to(tl.float32) + beside).to(out.dtype.element_ty)
    tl.store(out + row * width + at, result, mask=inside)


@triton.jit
def _activation(gate, KIND: tl.constexpr):
    """Return the activation of fp32 values, and its derivative."""
    if KIND == 0:
        share = 1.0 / (1.0 + tl.exp(-gate))
        return gate * share, share * (1.0 + gate * (1.0 - share))
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
    return 0.5 * gate * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * slope


@triton.jit
def gated_forward(gate, up, out, width, stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block of a row of activation(gate) · up; the rows of gate and up are `stride` apart."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at, there = row * width + column, row * stride + column
    active, _ = _activation(tl.load(gate + there, mask=inside, other=0).to(tl.float32), KIND)
    active = active.to(gate.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + there, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, (active * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    gradient, gate, up, gate_out, up_out, out, width, stride,
    AGAIN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of a row of the gradients of gate and up, `stride` apart like theirs; AGAIN: the product too."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at, there = row * width + column, row * stride + column
    above = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
    active, slope = _activation(tl.load(gate + there, mask=inside, other=0).to(tl.float32), KIND)
    active = active.to(gate.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + there, mask=inside, other=0).to(tl.float32)
    through = (above * factor).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(gate_out + there, (through * slope).to(gate_out.dtype.element_ty), mask=inside)
    tl.store(up_out + there, (above * active).to(up_out.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(out + at, (active * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    query, key, cosine, sine, out, tokens, heads, more, rotated, width,
    query_batch, query_head, query_token, key_batch, key_head, key_token, table_batch, table_token,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the halves of the first `rotated` elements of one token of one head (RoPE); copy those after them.

    BACKWARD: the transposed rotation, that of a gradient. `out` is contiguous [batch, tokens, heads + more, width]:
    the query's heads, then those of the key, of which there are `more`.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = tl.arange(0, BLOCK)
    half = rotated // 2
    inside = at < half
    if head < heads:
        base = query + batch * query_batch + head * query_head + token * query_token
    else:
        base = key + batch * key_batch + (head - heads) * key_head + token * key_token
    table = batch * table_batch + token * table_token
    first = tl.load(base + at, mask=inside, other=0).to(tl.float32)
    second = tl.load(base + half + at, mask=inside, other=0).to(tl.float32)
    cosine_1 = tl.load(cosine + table + at, mask=inside, other=0).to(tl.float32)
    cosine_2 = tl.load(cosine + table + half + at, mask=inside, other=0).to(tl.float32)
    sine_1 = tl.load(sine + table + at, mask=inside, other=0).to(tl.float32)
    sine_2 = tl.load(sine + table + half + at, mask=inside, other=0).to(tl.float32)
    narrow = query.dtype.element_ty
    if BACKWARD:
        one = (first * cosine_1).to(narrow).to(tl.float32) + (second * sine_2).to(narrow).to(tl.float32)
        two = (second * cosine_2).to(narrow).to(tl.float32) - (first * sine_1).to(narrow).to(tl.float32)
    else:
        one = (first * cosine_1).to(narrow).to(tl.float32) - (second * sine_1).to(narrow).to(tl.float32)
        two = (second * cosine_2).to(narrow).to(tl.float32) + (first * sine_2).to(narrow).to(tl.float32)
    to = out + ((batch * tokens + token) * (heads + more) + head) * width
    tl.store(to + at, one.to(out.dtype.element_ty), mask=inside)
    tl.store(to + half + at, two.to(out.dtype.element_ty), mask=inside)
    rest = at < width - rotated
    tl.store(to + rotated + at, tl.load(base + rotated + at, mask=rest, other=0), mask=rest)


@triton.jit
def cross_entropy_forward(logits, labels, losses, sums, classes, BLOCK: tl.constexpr):
    """Write log(sum(exp(logits))) - logits[label] of one row, and that logarithm."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * classes
    largest = -float("inf")
    total = 0.0
    for first in range(0, classes, BLOCK):
        at = first + tl.arange(0, BLOCK)
        block = tl.load(start + at, mask=at < classes, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(block, 0))
        shift = tl.where(above == -float("inf"), 0.0, above)  # so far, none may be finite
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(block - shift), 0)
        largest = above
    logarithm = largest + tl.log(total)
    tl.store(sums + row, logarithm)
    tl.store(losses + row, logarithm - tl.load(start + tl.load(labels + row)).to(tl.float32))


@triton.jit
def cross_entropy_backward(gradient, logits, labels, sums, out, classes, BLOCK: tl.constexpr):
    """Write gradient · (softmax(logits) - one_hot(label)) of a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < classes
    block = tl.load(logits + row * classes + at, mask=inside, other=0).to(tl.float32)
    share = tl.exp(block - tl.load(sums + row))
    share = tl.where(at == tl.load(labels + row), share - 1.0, share)
    result = share * tl.load(gradient + row)
    tl.store(out + row * classes + at, result.to(out.dtype.element_ty), mask=inside)
