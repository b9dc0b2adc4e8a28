"""The attention implementation "budwood": within the segments of a packed row, otherwise transformers' "sdpa".

A packed row [1, T] is a concatenation of examples. The model is called with `segments` (their boundaries) and with
`packed_mask` as attention mask, so that no T×T mask is built, and no segments are inferred from `position_ids`, which
would synchronise with the device. Other calls, such as generation with a cache, are identical to "sdpa". Soft-capping
and attention sinks, which "sdpa" does not support, are computed here with torch operations.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from budwood.model.device import capability, device_type
from budwood.model.ops import batched_attention as batched
from budwood.model.ops import segment_attention as segments_alone
from budwood.model.ops.dropout import dropout as drop_weights
from budwood.model.ops.segment_attention import segment_attention, takes

IMPLEMENTATION = "budwood"
"""Value of `attn_implementation` with which `segments` takes effect."""

_NOT_GIVEN: Any = object()
_apart: dict[str, None] = {}
"""Why no kernel computed attention on CUDA since the last `take_reasons`, without duplicates."""


def register() -> None:
    """Register "budwood" with transformers; may be called repeatedly."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def take_reasons() -> list[str]:
    """Return why no kernel has computed attention within segments on CUDA since the last call, but many operations."""
    reasons = list(_apart)
    _apart.clear()
    return reasons


def forget_layouts() -> None:
    """Drop the cached layouts of segments: those of a plan have no values."""
    for cached in (_device_bounds, segments_alone._layout, segments_alone._mask, batched._layout):
        cached.cache_clear()


def packed_mask(device: torch.device | str = "cpu") -> Tensor:
    """Return a placeholder for the attention mask of a packed row: an empty bool tensor [1, 1, 0, 0].

    transformers passes a four-dimensional mask through unchanged. A model that does not pass `segments` to its
    attention fails on the shape instead of mixing examples.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    segments: tuple[int, ...] | None = None,
    sliding_window: int | None = _NOT_GIVEN,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the interface of transformers; within each segment if `segments` is set.

    Args:
        module: the model's attention module; its `is_causal` applies if the argument is None.
        query: [R, H, T, D], R = 1 with segments.
        key: [R, K, T, D]; H is a multiple of K.
        value: [R, K, T, Dv].
        attention_mask: bool [R, 1, T, S], True: attend to the token; ignored with segments.
        scaling: factor of the scores; None: D to the power of -1/2.
        dropout: probability of dropping an attention weight.
        is_causal: whether a token attends only to itself and the tokens before it.
        segments: boundaries in tokens, (0, …); what follows the last is padding.
        sliding_window: number of tokens to which a causal token attends, including itself; otherwise, their number
            on each side, also including itself.
        softcap: bound of the scores, applied with tanh.
        s_aux: [H] attention sinks: one additional score per head, whose weight is discarded.
        kwargs: further arguments of some models.

    Returns:
        [R, T, H, Dv] and None (no attention weights).

    Raises:
        NotImplementedError: with segments, a type of attention that only its mask would define.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if segments:
        if segments[-1] < query.shape[2]:  # padding at the end attends to itself
            segments = (*segments, query.shape[2])
        window = _window(module, sliding_window, kwargs)
        return _packed(query, key, value, segments, causal, window, scaling, dropout, softcap, s_aux), None
    if softcap is not None or s_aux is not None:
        length = query.shape[2]
        if attention_mask is None and causal and length > 1:
            attention_mask = _band(length, query.device, True, None)
        return _plain(query, key, value, attention_mask, scaling, dropout, softcap, s_aux), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _window(module: nn.Module, sliding_window: int | None, kwargs: dict[str, Any]) -> int | None:
    """Return the sliding window of a layer; refuse layers whose restriction only the mask would define."""
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("this model adds a bias to the attention of each pair of positions")
    if sliding_window is not _NOT_GIVEN:
        return sliding_window
    config = getattr(module, "config", None)
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None) is not None:
            raise NotImplementedError(f"this model's attention does not report which layers have a {name}")
    return None


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    causal: bool,
    window: int | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention within each segment of one row: [1, H, T, D] to [1, T, H, Dv]."""
    lengths = [end - start for start, end in zip(segments, segments[1:], strict=False)]
    grouped = key.shape[1] != query.shape[1]
    plain = softcap is not None or sinks is not None
    if not plain and dropout == 0.0 and _varlen_takes(query, value):
        bounds, longest = _device_bounds(segments, query.device), max(lengths)
        reach = -1 if window is None else window - 1
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # its gradient is a view
        sides = (reach, 0 if causal else reach)
        varlen_attn, parameters = _varlen()
        options: dict[str, Any] = {"enable_gqa": grouped} if "enable_gqa" in parameters else {}
        if grouped and not options:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=sides, **options)
        assert isinstance(out, Tensor)  # a pair only if the log-sum-exp is requested
        return out.unsqueeze(0)
    if len(lengths) > 1 and device_type(query) == "cuda":
        _apart[_why_apart(query, value, dropout, softcap, sinks)] = None
    if not plain and batched.takes(query, segments, dropout):
        return batched.batched_attention(query, key, value, segments, causal, window, scaling, dropout)
    if not plain and dropout == 0.0 and takes(query, value, segments):
        return segment_attention(query, key, value, segments, causal, window, scaling)
    outputs: list[Tensor] = []
    # `split`, not slices: the backward of each slice would allocate a tensor for the complete row.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        length = q.shape[2]
        narrow = window is not None and window < length
        mask = _band(length, q.device, causal, window) if narrow or (plain and causal) else None
        if plain:
            outputs.append(_plain(q, k, v, mask, scaling, dropout, softcap, sinks))
            continue
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=causal and mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention with torch operations, [R, H, T, D] to [R, T, H, Dv]; fp32 softmax as in "eager"."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[..., : key.shape[2]], torch.finfo(scores.dtype).min)
    if sinks is not None:
        rows, heads, length, _ = scores.shape
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, heads, 1, 1).expand(rows, -1, length, 1)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return (drop_weights(weights, dropout) @ value).transpose(1, 2)


def _band(length: int, device: torch.device, causal: bool, window: int | None) -> Tensor:
    """Return a bool mask [length, length]: True where a token (row) attends to another (column)."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    mask = ones.tril() if causal else ones
    if window is None:
        return mask
    return mask.triu(1 - window) if causal else mask.triu(1 - window).tril(window - 1)


def _why_apart(query: Tensor, value: Tensor, dropout: float, softcap: float | None, sinks: Tensor | None) -> str:
    """Return why no kernel for segments of several lengths takes these tensors."""
    if softcap is not None:
        return "its scores are soft-capped"
    if sinks is not None:
        return "it has sinks"
    if dropout:
        return "it drops weights by chance"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it is in {str(query.dtype).removeprefix('torch.')}"
    if capability(query) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return f"its heads are {query.shape[-1]} and {value.shape[-1]} wide"


def _varlen_takes(query: Tensor, value: Tensor) -> bool:
    """Return whether the variable-length kernel (CUDA, 16 bit) supports these tensors."""
    size = query.shape[-1]
    return (
        device_type(query) == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and size == value.shape[-1]
        and size <= 256
        and size % 8 == 0
        and capability(query) >= (8, 0)
        and "window_size" in _varlen()[1]
    )


@functools.cache
def _varlen() -> tuple[Any, frozenset[str]]:
    """Return the variable-length kernel and the names of its arguments; importing it takes two seconds.

    It has no windows in torch 2.10, and no grouped heads in torch 2.11.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@functools.lru_cache(maxsize=4)
def _device_bounds(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the boundaries as int32 on the device; cached for all layers of a micro-step and their recomputation."""
    with torch.inference_mode(False):
        return torch.tensor(segments, dtype=torch.int32).to(device, non_blocking=True)
