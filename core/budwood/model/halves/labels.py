"""The last decoder layer at the positions alone that the head reads: its keys and values at all, the rest at these.

Nothing below the head looks at the other positions of the last layer's output, so neither the projection of its
attention's result nor its MLP need them. Whoever else reads the hidden states must not ask for `labels_alone`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from budwood.model.halves.layer import Halves
from budwood.model.ops.rms_norm import Norm

WORTH = 7 / 8
"""Share of labelled positions above which the whole layer is computed: picking rows would cost what it saves."""
PARTS = {"embed_tokens", "layers", "norm", "rotary_emb", "rotary_emb_local"}
"""Modules of a decoder whose layers are followed by a norm, and by nothing else."""

_alone: ContextVar[bool] = ContextVar("labels_alone", default=False)


@contextmanager
def labels_alone(alone: bool = True) -> Iterator[None]:
    """Promise that inside of the context, hidden states are read at label positions alone."""
    token = _alone.set(alone)
    try:
        yield
    finally:
        _alone.reset(token)


def hidden_states(body: nn.Module, inputs: dict[str, Any], positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the output [rows, width, d] of a decoder below its head.

    Inside of `labels_alone`, if its last layer computes in halves, that layer computes `positions` only, and the other
    rows are NaN, so that reading one shows in the loss.

    Args:
        body: the decoder.
        inputs: its keyword arguments.
        positions: [L] int64 into the flattened rows, of which the head reads the output; they may repeat.
        shape: rows and width.
    """
    count = shape[0] * shape[1]
    last = _last(body) if _alone.get() and 0 < len(positions) <= WORTH * count else None
    if last is None:
        whole: Tensor = body(**inputs).last_hidden_state
        return whole
    last.rows = positions
    try:
        hidden: Tensor = body(**inputs).last_hidden_state
    finally:
        taken, last.rows = last.rows is None, None
    if not taken:  # the layer took the model's own forward
        return hidden
    spread: Tensor = _Spread.apply(hidden.flatten(0, 1), positions, count)
    return spread.view(*shape, -1)


def _last(body: nn.Module) -> Halves | None:
    """Return the last layer of a decoder if it can compute some positions alone, and only a norm follows it."""
    given: Any = body
    layers, norm = getattr(given, "layers", None), getattr(given, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or norm is None or "forward" in given.__dict__:
        return None
    own, after = layers[-1].__dict__.get("forward"), norm.__dict__.get("forward")
    usual = isinstance(own, Halves) and own.dense and type(norm).__name__.endswith("Norm")
    usual = usual and (after is None or isinstance(after, Norm))
    watched = any(module._forward_hooks or module._forward_pre_hooks for module in (norm, layers[-1]))
    if not usual or watched or given._forward_hooks or not {name for name, _ in given.named_children()} <= PARTS:
        return None
    return own


class _Spread(torch.autograd.Function):
    """Puts rows [L, d] in their places among `count` rows of NaN."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(positions)
        return rows.new_full((count, rows.shape[-1]), torch.nan).index_copy_(0, positions, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (positions,), (gradient,) = ctx.saved_tensors, gradients
        shares = gradient.new_zeros(len(gradient), dtype=torch.float32)
        shares.index_add_(0, positions, shares.new_ones(1).expand(len(positions)))
        # A position that comes twice has two equal rows, which share its gradient.
        return gradient[positions].div_(shares[positions, None]), None, None
