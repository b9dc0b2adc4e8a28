"""The forward of a projection of experts for the adapters of a batch's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.adapters.expert_layers import rows_of
from budwood.adapters.live_rows import Layout, UnmixableError
from budwood.adapters.live_update import LiveAdapter, LiveUpdate
from budwood.model.ops.experts import Routing, expert_linear, low_rank_of_experts

if TYPE_CHECKING:
    from budwood.adapters.live_table import LiveModule


def experts(live: LiveModule, layout: Layout, adapters: list[LiveAdapter]) -> Callable[[Tensor, Routing], Tensor]:
    """Return the forward for rows with different adapters, of which `adapters` have an entry for this projection.

    One adapter for all rows is computed as in a training run. In a mixed batch the base's output of all rows comes
    first, and each adapter then changes its own tokens.
    """
    base, count = live.module, len(layout.rows)

    def alone(x: Tensor, routing: Routing) -> Tensor:
        update = adapters[0].updates[live.path]
        if update.folded:
            return _changed(live.plain(x, routing), x, update, routing)
        y = expert_linear(x, base, routing, update.a, update.b, update.scaling)
        return _scaled(y, update, routing)

    def mixed(x: Tensor, routing: Routing) -> Tensor:
        y = live.plain(x, routing)
        try:
            rows = rows_of(routing, count)
        except ValueError as error:
            raise UnmixableError(f"'{live.path}': {error}") from error
        for adapter in adapters:
            update = adapter.updates[live.path]
            members = layout.tensor(layout.members(adapter), x.device)
            tokens = torch.isin(rows, members).nonzero()[:, 0]
            own = y.index_select(0, tokens), x.index_select(0, tokens), update, routing.part(tokens)
            y = y.index_copy(0, tokens, _changed(*own))
        return y

    return alone if len(layout.distinct) == 1 else mixed


def _changed(y: Tensor, x: Tensor, update: LiveUpdate, routing: Routing) -> Tensor:
    """Return the base's output y of an adapter's tokens with its update."""
    if update.folded:
        y = _scaled(y, update, routing)
    if update.a is not None and update.b is not None:
        y = y + update.scaling * low_rank_of_experts(x.to(y.dtype), update.a, update.b, routing)
    return y if update.folded else _scaled(y, update, routing)


def _scaled(y: Tensor, update: LiveUpdate, routing: Routing) -> Tensor:
    if update.gain is None:
        return y
    return (y * update.gain.index_select(0, routing.ids)).to(y.dtype)
