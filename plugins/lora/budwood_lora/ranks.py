"""The rank of a LoRA adapter that a run continues: kept, or raised. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from budwood import InputError
from budwood.lowrank import saved_pattern, saved_targets
from budwood_lora.options import LoRAOptions, SavedConfig

if TYPE_CHECKING:
    from torch import nn


def grows(model: nn.Module, saved: SavedConfig, rank: int) -> bool:
    """Return whether a run with this rank raises that of an update; one with the file's `r` keeps the ranks of all.

    Raises:
        MisfitError, InputError: see `saved_targets`.
    """
    return rank != saved.r and min(_ranks(model, saved).values()) < rank


def check_rank(model: nn.Module, saved: SavedConfig, directory: Path, options: LoRAOptions) -> None:
    """Check the options of a run that continues an adapter, which may raise its rank, and then change its alpha.

    Raises:
        InputError: they lower a rank, or change the alpha or the initialisation of an adapter whose rank stays.
    """
    ranks = _ranks(model, saved)
    largest = max(ranks, key=lambda path: ranks[path])
    if options.rank != saved.r and options.rank < ranks[largest]:
        raise InputError(
            f"rank: {options.rank} is lower than that of '{largest}' in {directory}, {ranks[largest]}: leave it out, "
            f"or lower it first, which is lossy: budwood adapter shrink {directory} OUT --rank {options.rank}"
        )
    if grows(model, saved, options.rank):
        return
    if options.alpha != saved.lora_alpha:
        raise InputError(
            f"alpha: {options.alpha:g} contradicts the adapter in {directory}, which has {saved.lora_alpha:g}: leave "
            "it out, or raise the rank as well."
        )
    if options.init != "default":
        raise InputError("init: the run continues an adapter, which is not initialised: leave it out.")


def _ranks(model: nn.Module, saved: SavedConfig) -> dict[str, int]:
    """Return the rank of each of a saved adapter's updates, by the full name of its module."""
    targets = saved_targets(model, saved)
    patterns = saved_pattern(saved.rank_pattern, targets)
    return {path: patterns.get(re.escape(path), saved.r) for path in targets}
