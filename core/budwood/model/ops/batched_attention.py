"""Attention within the short segments of a packed row: segments of similar length are padded to one batch.

On a CPU, the products of a short segment take less time than what surrounds them: `segment_attention` pads it to 64
tokens, and with dropout torch's kernel is a sequence of operations for each segment. Measured there, forward and
backward, on rows of 2,048 tokens: segments of 6 to 20 tokens take a third of the time in bf16, and half with dropout;
at 20 to 70 tokens the others are faster.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from budwood.model.device import device_type
from budwood.model.ops.dropout import dropout as drop_weights

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
    outputs = []
    batches, order = _layout(segments, causal, window, query.device)
    for tokens, mask in batches:
        rows = [x.index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[1:]) for x in (q, k, v)]
        out = _attend(rows[0], rows[1], rows[2], mask, scaling, dropout)
        outputs.append(out.flatten(0, 1))  # [segments · length, H, Dv]
    return torch.cat(outputs).index_select(0, order)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, dropout: float) -> Tensor:
    """Compute attention of a batch, [n, L, heads, D] to [n, L, H, Dv]."""
    count, length, heads, size = query.shape
    shared = heads // key.shape[2]  # query heads for each head of keys and values
    q = query.view(count, length, -1, shared, size).permute(0, 2, 3, 1, 4).reshape(-1, shared * length, size)
    k, v = (x.transpose(1, 2).reshape(-1, length, x.shape[-1]) for x in (key, value))
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # it would compute the scores in 16 bit
        scores = torch.bmm(q.to(wide) * scaling, k.to(wide).mT).view(count, -1, shared, length, length)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).to(v.dtype)
    weights = drop_weights(weights, dropout).view(-1, shared * length, length)
    out = torch.bmm(weights, v).view(count, -1, shared, length, v.shape[-1])
    return out.permute(0, 3, 1, 2, 4).reshape(count, length, heads, -1)


@functools.lru_cache(maxsize=8)
def _layout(
    segments: tuple[int, ...], causal: bool, window: int | None, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return the batches of a row, and the index of each of its tokens in their concatenated outputs.

    A batch has the index of each token, [segments, length], and the mask, bool [segments, 1, 1, length, length], True:
    attend. Padding repeats a segment's first token, to which none of its tokens attends again.
    """
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
        near = np.ones((length, length), dtype=bool) if window is None else np.abs(reach) < window
        mask = (near & (reach >= 0) if causal else near) & real[:, None, :]
        mask[:, :, 0] |= ~real  # padding attends to something, so that its softmax is finite
        order[tokens[real]] = done + np.flatnonzero(real)
        done += real.size
        with torch.inference_mode(False):
            batches.append((torch.from_numpy(tokens).to(device), torch.from_numpy(mask[:, None, None]).to(device)))
    with torch.inference_mode(False):
        return batches, torch.from_numpy(order).to(device)
