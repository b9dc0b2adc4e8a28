"""Attention within the segments of a packed row as batched bf16 matrix products, for CPUs that support them.

torch's CPU attention kernel is written for long sequences: on the short segments of a packed row, its backward pass in
bf16 takes several times as long as the products alone. Here, each segment is padded to a multiple of 64, because oneDNN
compiles code for each shape. Scores and softmax are fp32 as in torch's kernel, and the attention weights are saved in
bf16 for the backward pass. They take length / (8 · head size) times the memory of query, key, value and output, so
rows with a segment longer than `longest(head size)` use torch's kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from budwood.model.device import device_type

PAD = 64
"""Segments are padded to a multiple of this number of tokens."""
BLOCK = 256
"""Queries per block of a causal segment; a block only computes scores for keys up to its end."""
CACHED = 1 << 19
"""Maximum number of scores of short segments computed together, chosen such that they stay in a core's cache."""


def longest(head_size: int) -> int:
    """Return the longest segment, in tokens, for which saving the attention weights is worth the memory."""
    return 16 * head_size


def takes(query: Tensor, value: Tensor, segments: tuple[int, ...]) -> bool:
    """Return whether `segment_attention` is the better kernel for these tensors: bf16 on a CPU with bf16 products."""
    return (
        device_type(query) == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[-1] == value.shape[-1]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and max(end - start for start, end in zip(segments, segments[1:], strict=False)) <= longest(query.shape[-1])
    )


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    causal: bool,
    window: int | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Compute attention within each segment of one packed row: softmax(scaling · Q Kᵀ + mask) V.

    Args:
        query: [1, H, T, D] bf16.
        key: [1, K, T, D]; H is a multiple of K.
        value: [1, K, T, D].
        segments: boundaries in tokens, (0, …, T).
        causal: whether a token attends only to itself and the tokens before it.
        window: number of tokens to which a causal token attends, including itself; otherwise, their number on each
            side, also including itself.
        scaling: factor of the scores; None: D to the power of -1/2.

    Returns:
        [1, T, H, D] bf16.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    result: Tensor = _SegmentAttention.apply(query, key, value, segments, causal, window, scaling)
    return result


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[int, ...],
        causal: bool,
        window: int | None,
        scaling: float,
    ) -> Tensor:
        heads, shared = query.shape[1], query.shape[1] // key.shape[1]
        groups = _groups(segments, heads, causal)
        at_queries, at_keys = _layout(segments, groups, heads), _layout(segments, groups, key.shape[1])
        q, k, v = at_queries.gather(query), at_keys.gather(key), at_keys.gather(value)
        q32, k32 = q.float(), k.float()
        out, weights = torch.empty_like(q), []
        with torch.autocast("cpu", enabled=False), _bf16_products():
            for group in groups:
                qs, ks, vs, outs = (
                    layout.of(rows, group)
                    for layout, rows in ((at_queries, q32), (at_keys, k32), (at_keys, v), (at_queries, out))
                )
                for first, last, seen in _blocks(group.padded, causal):
                    scores = torch.bmm(_rows(qs, first, last, shared), ks[:, :seen].mT)
                    scores = scores.view(len(qs), last - first, seen)
                    mask = _mask(first, last, seen, group.length, causal, window)
                    torch.add(mask, scores, alpha=scaling, out=scores)
                    weight = torch.softmax(scores, -1).to(v.dtype)
                    weights.append(weight)
                    _product(weight.view(len(ks), -1, seen), vs[:, :seen], outs, first, last)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.segments, ctx.causal, ctx.scaling = segments, causal, scaling
        return at_queries.scatter(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        heads, shared = gradients[0].shape[2], len(q) // len(k)
        groups = _groups(ctx.segments, heads, ctx.causal)
        at_queries, at_keys = _layout(ctx.segments, groups, heads), _layout(ctx.segments, groups, heads // shared)
        # Padding has no gradient, so it adds none to any key or value.
        gradient = at_queries.gather(gradients[0].transpose(1, 2)).index_fill_(0, at_queries.padding, 0)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        used = 0
        for group in groups:
            qs, gs, grad_qs = (at_queries.of(rows, group) for rows in (q, gradient, grad_q))
            ks, vs, grad_ks, grad_vs = (at_keys.of(rows, group) for rows in (k, v, grad_k, grad_v))
            blocks = list(_blocks(group.padded, ctx.causal))
            # The last block attends to every key: it initialises the gradients of keys, the others add to them.
            for index in reversed(range(len(blocks))):
                first, last, seen = blocks[index]
                weight = weights[used + index]
                rows_q, rows_g = _rows(qs, first, last, shared), _rows(gs, first, last, shared)
                grad_weight = torch.bmm(rows_g, vs[:, :seen].mT).view_as(weight)
                grad_scores = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
                grad_scores, weight = grad_scores.view(len(ks), -1, seen), weight.view(len(ks), -1, seen)
                _product(grad_scores, ks[:, :seen], grad_qs, first, last)
                if index == len(blocks) - 1:
                    torch.bmm(grad_scores.mT, rows_q, out=grad_ks), torch.bmm(weight.mT, rows_g, out=grad_vs)
                else:
                    grad_ks[:, :seen].add_(torch.bmm(grad_scores.mT, rows_q))
                    grad_vs[:, :seen].add_(torch.bmm(weight.mT, rows_g))
            used += len(blocks)
        grads = (
            at_queries.scatter(grad_q.mul_(ctx.scaling)),
            at_keys.scatter(grad_k.mul_(ctx.scaling)),
            at_keys.scatter(grad_v),
        )
        return *(grad.transpose(1, 2) for grad in grads), None, None, None, None


@dataclass(frozen=True)
class _Group:
    """Segments that are computed together.

    Attributes:
        members: indices of the segments, in the order of the row.
        length: tokens per segment; for causal attention, which never attends to padding, the padded length.
        padded: tokens per segment with padding.
        first: offset of the group's first token among the padded tokens of all groups.
    """

    members: tuple[int, ...]
    length: int
    padded: int
    first: int


@functools.lru_cache(maxsize=8)
def _groups(segments: tuple[int, ...], heads: int, causal: bool) -> tuple[_Group, ...]:
    """Group the segments of a row by length, with at most CACHED scores per group."""
    by_length: dict[int, list[int]] = {}
    for number, (first, last) in enumerate(zip(segments, segments[1:], strict=False)):
        by_length.setdefault(_padded(last - first) if causal else last - first, []).append(number)
    groups, start = [], 0
    for length, members in by_length.items():
        padded = _padded(length)
        most = max(1, CACHED // (heads * padded * (min(padded, BLOCK) if causal else padded)))
        for at in range(0, len(members), most):
            group = _Group(tuple(members[at : at + most]), length, padded, start)
            groups.append(group)
            start += len(group.members) * padded
    return tuple(groups)


def _padded(length: int) -> int:
    return -(-length // PAD) * PAD


@dataclass(frozen=True)
class _Layout:
    """Token indices for a layout with one dense block [heads, padded length, D] per segment, group after group.

    Attributes:
        source: [rows] int64 into the row's [T · heads]; padding repeats a segment's last token.
        target: [T · heads] int64, the inverse mapping.
        padding: int64, the rows that are padding.
    """

    heads: int
    source: Tensor
    target: Tensor
    padding: Tensor

    def gather(self, states: Tensor) -> Tensor:
        """Convert [1, heads, T, D] to [rows, D]."""
        return states.transpose(1, 2).reshape(-1, states.shape[-1]).index_select(0, self.source)

    def scatter(self, rows: Tensor) -> Tensor:
        """Convert [rows, D] to [1, T, heads, D]."""
        return rows.index_select(0, self.target).view(1, -1, self.heads, rows.shape[-1])

    def of(self, rows: Tensor, group: _Group) -> Tensor:
        """Return a view [segments · heads, padded length, D] of one group's part of `rows` [rows, D]."""
        first, last = (self.heads * at for at in (group.first, group.first + len(group.members) * group.padded))
        return rows[first:last].view(-1, group.padded, rows.shape[-1])


@functools.lru_cache(maxsize=8)
def _layout(segments: tuple[int, ...], groups: tuple[_Group, ...], heads: int) -> _Layout:
    """Return the layout of a row; cached for all layers of a micro-step and their recomputation."""
    with torch.inference_mode(False):
        head = torch.arange(heads)
        sources, start = [], 0
        target = torch.empty(segments[-1], heads, dtype=torch.int64)
        for group in groups:
            for first, last in ((segments[number], segments[number + 1]) for number in group.members):
                tokens = torch.arange(first, first + group.padded).clamp(max=last - 1)
                sources.append((tokens * heads + head[:, None]).flatten())
                target[first:last] = start + head * group.padded + torch.arange(last - first)[:, None]
                start += heads * group.padded
        source, target = torch.cat(sources), target.flatten()
        unowned = torch.ones(len(source), dtype=torch.bool)
        unowned[target] = False
        return _Layout(heads, source, target, torch.nonzero_static(unowned, size=len(source) - len(target))[:, 0])


def _blocks(padded: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last, seen) of each block of queries; `seen` is the number of keys to which it may attend."""
    if not causal:
        yield 0, padded, padded
        return
    for first in range(0, padded, BLOCK):
        last = min(first + BLOCK, padded)
        yield first, last, last


def _rows(states: Tensor, first: int, last: int, groups: int) -> Tensor:
    """Reshape the queries of a block [H, padded, D] to [K, groups · rows, D], grouped by their key head."""
    return states[:, first:last].reshape(len(states) // groups, -1, states.shape[-1])


def _product(one: Tensor, other: Tensor, out: Tensor, first: int, last: int) -> None:
    """Write one @ other, whose rows are those of a block of queries grouped by key head, to out[:, first:last].

    Args:
        out: [H, padded, D], contiguous.
    """
    if last - first == out.shape[1]:
        torch.bmm(one, other, out=out.view(len(one), -1, out.shape[-1]))
    else:
        out[:, first:last] = torch.bmm(one, other).view(len(out), last - first, -1)


@functools.lru_cache(maxsize=256)
def _mask(first: int, last: int, seen: int, length: int, causal: bool, window: int | None) -> Tensor:
    """Return fp32 [rows, seen]: 0 to attend, -inf otherwise. A row of padding attends at least to its first key."""
    with torch.inference_mode(False):
        row, column = torch.arange(first, last)[:, None], torch.arange(seen)
        hidden = column >= length
        if causal:
            hidden = column > row
        if window is not None:
            hidden = hidden | (column <= row - window) | (column >= row + window)
        hidden = hidden & ((row < length) | (column > 0))
        return torch.zeros(last - first, seen).masked_fill_(hidden, -math.inf)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Multiply fp32 tensors in bf16 with fp32 accumulation; exact here, because their values were cast from bf16."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
