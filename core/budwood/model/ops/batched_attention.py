"""Attention within the short segments of a packed row: segments of similar length are padded to one batch.

On a CPU, the products of a short segment take less time than what surrounds them: `segment_attention` pads it to 64
tokens, and with dropout torch's kernel is a sequence of operations for each segment. Measured there, forward and
backward, on rows of 2,048 tokens: segments of 6 to 20 tokens take a third of the time in bf16, and half with dropout;
at 20 to 70 tokens the others are faster.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from budwood.model.device import device_type
from budwood.model.ops.dropout import drop, drop_again, drop_factor

LONGEST = 40
"""Longest segment of a row that is computed in batches."""
PAD = 8
"""Lengths of a batch: this number of tokens times a power of 2, so that less than half of a batch is padding."""


def takes(query: Tensor, segments: tuple[int, ...], dropout: float) -> bool:
    """Return whether `batched_attention` is the better kernel: for short segments, in 16 bit or with dropout."""
    lengths = [end - start for start, end in zip(segments, segments[1:], strict=False)]
    short = len(lengths) > 1 and max(lengths) <= LONGEST
    return short and (dropout > 0 or device_type(query) == "cuda" or query.dtype in (torch.float16, torch.bfloat16))


def batched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    causal: bool,
    window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention within each segment of one packed row; scores and softmax are fp32.

    Args:
        query: [1, H, T, D].
        key: [1, K, T, D]; H is a multiple of K.
        value: [1, K, T, Dv].
        segments: boundaries in tokens, (0, …, T).
        causal: whether a token attends only to itself and the tokens before it.
        window: number of tokens to which a causal token attends, including itself; otherwise, their number on each
            side, also including itself.
        scaling: factor of the scores; None: D to the power of -1/2.
        dropout: probability of dropping an attention weight.

    Returns:
        [1, T, H, Dv].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    out: Tensor = _BatchedAttention.apply(q, k, v, segments, (causal, window), scaling, dropout)
    return out[None]


class _BatchedAttention(torch.autograd.Function):
    """Apply(query [T, H, D], key, value, segments, (causal, window), scaling, dropout) to [T, H, Dv].

    With P = softmax(s Q Kᵀ + mask), D = its mask of dropout, and O = (P ∘ D) V: ∂V = (P ∘ D)ᵀ ∂O,
    ∂P = D ∘ (∂O Vᵀ), ∂S = P ∘ (∂P - rowsum(P ∘ ∂P)), ∂Q = s ∂S K, ∂K = s ∂Sᵀ Q. The gradients of padded queries are 0,
    so that padding has no gradient, and that of a token is at its one place in the batches.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[int, ...],
        reach: tuple[bool, int | None], scaling: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        layout = _layout(segments, *reach, query.device)
        heads, shared = query.shape[1], query.shape[1] // key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        saved: list[Tensor] = []
        outputs = []
        with torch.autocast(query.device.type, enabled=False):  # it would compute the scores in 16 bit
            for batch in layout.batches:
                q, k = _take(query, batch, shared).to(wide), _take(key, batch, 1).to(wide)
                v = _take(value, batch, 1)
                each = shared if batch.mask.shape[-2] > 1 else 1  # one mask for all queries
                mask = batch.mask.to(wide).expand(-1, heads // shared, each, -1, -1).reshape(len(q), -1, k.shape[1])
                weights = torch.baddbmm(mask, q, k.mT, alpha=scaling).softmax(-1)
                kept, drawn = weights.to(v.dtype), weights.new_empty(0)
                if dropout:
                    kept, drawn = drop(kept, dropout)
                out = torch.bmm(kept, v)
                outputs.append(out.mul_(drop_factor(v, dropout)) if dropout else out)
                saved += [q, k, v, weights, drawn]
            result = _give(outputs, layout, shared)
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.shared, ctx.scaling, ctx.dropout = layout, shared, scaling, dropout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[list[Tensor], ...] = ([], [], [])
        saved = ctx.saved_tensors
        with torch.autocast(gradients[0].device.type, enabled=False):
            for i, batch in enumerate(ctx.layout.batches):
                q, k, v, weights, drawn = saved[5 * i : 5 * i + 5]
                gradient = _take(gradients[0].to(v.dtype), batch, ctx.shared)
                gradient.view(len(batch.tokens), -1, k.shape[1], v.shape[2]).mul_(batch.real)
                if ctx.dropout:
                    gradient.mul_(drop_factor(v, ctx.dropout))
                kept, of_weights = weights.to(v.dtype), torch.bmm(gradient, v.mT)
                if ctx.dropout:
                    kept, of_weights = (drop_again(x, drawn, ctx.dropout) for x in (kept, of_weights))
                of_weights = of_weights.to(weights.dtype)
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
                for parts, part in zip(found, (of_scores @ k, of_scores.mT @ q, kept.mT @ gradient), strict=True):
                    parts.append(part.to(gradients[0].dtype))
            given = [_give(parts, ctx.layout, n) for parts, n in zip(found, (ctx.shared, 1, 1), strict=True)]
        return (*given, None, None, None, None)


@dataclass(frozen=True)
class _Batch:
    """Segments that are padded to one length L.

    Attributes:
        tokens: index of each token in the row, [segments, L] int64; padding repeats the first.
        mask: [segments, 1, 1, L or 1, L], what is added to the scores: 0, or the smallest number of fp32.
        real: [segments, 1, L, 1] fp32: 1, or 0 for padding.
    """

    tokens: Tensor
    mask: Tensor
    real: Tensor


@dataclass(frozen=True)
class _Layout:
    """The batches of a row; and the place of each of its tokens in their concatenation, [T] int64."""

    batches: tuple[_Batch, ...]
    order: Tensor


def _take(x: Tensor, batch: _Batch, shared: int) -> Tensor:
    """Return the tokens of a batch, [T, heads, D] to [segments · heads / shared, shared · L, D]."""
    count, length = batch.tokens.shape
    found = x.index_select(0, batch.tokens.view(-1)).view(count, length, *x.shape[1:]).transpose(1, 2)
    return found.reshape(-1, shared * length, x.shape[-1])


def _give(parts: Sequence[Tensor], layout: _Layout, shared: int) -> Tensor:
    """Return what `_take` has taken, of all batches: [T, heads, D]."""
    rows = []
    for part, batch in zip(parts, layout.batches, strict=True):
        count, length = batch.tokens.shape
        rows.append(part.view(count, -1, length, part.shape[-1]).transpose(1, 2).flatten(0, 1))
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).index_select(0, layout.order)


@functools.lru_cache(maxsize=8)
def _layout(segments: tuple[int, ...], causal: bool, window: int | None, device: torch.device) -> _Layout:
    """Return the batches of a row. No token attends to padding, and padding attends at least to its segment's first."""
    bounds = np.asarray(segments)
    starts, lengths = bounds[:-1], np.diff(bounds)
    padded = PAD * 2 ** np.ceil(np.log2(np.maximum(lengths / PAD, 1))).astype(np.int64)
    order, batches, done = np.empty(bounds[-1], dtype=np.int64), [], 0
    for size in np.unique(padded):
        members = np.flatnonzero(padded == size)
        length = int(lengths[members].max())
        at = np.arange(length)
        real = at < lengths[members, None]
        tokens = starts[members, None] + np.where(real, at, 0)
        reach = at[:, None] - at[None, :]
        near = np.ones((1, length), dtype=bool) if window is None else np.abs(reach) < window
        attends = (near & (reach >= 0) if causal else near) & real[:, None, :]
        if len(near) > 1:
            attends[:, :, 0] |= ~real  # so that the softmax of padding is finite
        order[tokens[real]] = done + np.flatnonzero(real)
        done += real.size
        mask = np.where(attends, 0, np.finfo(np.float32).min).astype(np.float32)
        arrays = tokens, mask[:, None, None], real.astype(np.float32)[:, None, :, None]
        with torch.inference_mode(False):
            batches.append(_Batch(*(torch.from_numpy(array).to(device) for array in arrays)))
    with torch.inference_mode(False):
        return _Layout(tuple(batches), torch.from_numpy(order).to(device))
