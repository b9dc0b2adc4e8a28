"""The choice of adapters on a live model: one way to say it, for owners of either version of the contract."""

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
    """Choose which adapters of a strategy compute in the next forwards.

    Args:
        owner: whose adapters they are.
        names: distinct names; empty: the base computes alone.
        index: for each row of the next batches, which of `names` computes it; -1: the base alone. Empty: the one name
            computes every row.
        lengths: tokens of each segment of packed rows, which add up to the batch's positions; `index` then has one
            entry a segment.

    Raises:
        InputError: the owner cannot mix these adapters in one batch.
        PluginError: see `ask_owner`.
        ValueError: `index` does not fit `names` or `lengths`.
    """
    if len(names) > 1 and not index:
        raise ValueError(f"{len(names)} adapters, and no index that says which of them computes which row")
    if any(not -1 <= i < len(names) for i in index):
        raise ValueError(f"an index points at none of the {len(names)} adapters")
    if lengths and len(lengths) != len(index):
        raise ValueError(f"{len(lengths)} segments, and an index of {len(index)}")
    chosen = sorted({i for i in index if i >= 0}) if index else range(len(names))
    names = [names[i] for i in chosen]
    if len(set(index)) <= 1:  # one for all
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
