"""What a sharded base saves of a run's memory, and whether a run with several processes shards it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from budwood.contract.types import Run
from budwood.errors import InputError
from budwood.model.heads import body_of
from budwood.model.recompute import layers_of
from budwood.model.sharding import check_shards
from budwood.planning.rehearsal import BASE, QUANTIZED

if TYPE_CHECKING:
    from budwood.planning.estimate import Estimate


def can_shard(run: Run, skeleton: Any) -> bool:
    """Whether the recipe leaves open how the processes hold the base, and they can shard it."""
    if run.processes == 1 or run.recipe.train.parallel is not None or run.hooks.implements("load_base"):
        return False
    try:
        check_shards(run.recipe.base.model, skeleton, run.recipe.base.quantization)
    except InputError:
        return False
    return True


def saved(run: Run, skeleton: Any, result: Estimate) -> int:
    """Return the bytes that a process does not need if the base of an estimated run is sharded.

    It holds its share of the layers' matrices, and two complete layers: one computes, the next is gathered.
    """
    layers = layers_of(body_of(skeleton))
    sizes = [sum(p.numel() for p in layer.parameters() if p.ndim > 1) for layer in layers]
    quantized, share = result.parts.get(QUANTIZED, 0), sum(sizes) / sum(p.numel() for p in skeleton.parameters())
    stored = quantized or result.parts.get(BASE, 0) * share
    return int(max(stored * (1 - 1 / run.processes) - 2 * stored * max(sizes) / sum(sizes), 0))
