"""Selection of adapters on a live model, through owners of either contract version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from budwood.contract.calls import ask_owner
from budwood.contract.strategy import Strategy
from budwood.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def use_adapters(
    owner: Strategy,
    model: nn.Module,
    names: Sequence[str] = (),
    index: Sequence[int] = (),
    lengths: Sequence[int] = (),
) -> None:
    """Select the adapters of a strategy for the next forward passes.

    Args:
        owner: the strategy that owns the adapters.
        names: distinct names; empty: the base alone.
        index: for each row of the next batches, an index into `names`; -1: the base alone. Empty: the single name
            computes all rows.
        lengths: tokens of each segment of packed rows, which sum to the batch's positions; `index` then has one entry
            per segment.

    Raises:
        InputError: the owner cannot mix these adapters in one batch.
        PluginError: see `ask_owner`.
        ValueError: `index` does not match `names` or `lengths`.
    """
    if len(names) > 1 and not index:
        raise ValueError(f"{len(names)} adapters need an index that assigns one to each row")
    if any(not -1 <= i < len(names) for i in index):
        raise ValueError(f"an index is outside the {len(names)} adapters")
    if lengths and len(lengths) != len(index):
        raise ValueError(f"{len(lengths)} segments, but an index of {len(index)} entries")
    chosen = sorted({i for i in index if i >= 0}) if index else range(len(names))
    names = [names[i] for i in chosen]
    if len(set(index)) <= 1:  # the same adapter for all rows
        index, lengths = (), ()
    if owner.api < 2:
        if lengths:
            raise InputError(f"{owner} cannot mix adapters within packed rows.")
        rows = [names[chosen.index(i)] if i >= 0 else None for i in index] if index else names
        ask_owner(owner, "use_adapters", model=model, names=rows)
        return
    index = [chosen.index(i) if i >= 0 else -1 for i in index]
    if lengths:
        index = [i for i, length in zip(index, lengths, strict=True) for _ in range(length)]
    ask_owner(owner, "use_adapters", model=model, names=names, index=index)
