"""Any method that changes weights, as LoRA: a singular value decomposition of the difference that merging makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from budwood.adapters.store import SavedAdapter
from budwood.errors import InputError
from budwood.serving.exports.factors import (
    Factors,
    check_language_model,
    check_plain,
    factors_of,
    largest_rank,
    split,
    truncated,
)
from budwood.serving.exports.wanted import PROGRAMS, Wanted
from budwood.serving.merge import original_weights
from budwood.serving.pool import AdapterPool
from budwood.serving.verify import open_base

EXACT_SVD = 1024
"""Largest smaller side of a matrix that is decomposed completely; larger ones by a randomised range (Halko, 2011)."""


@torch.no_grad()
def factors_of_difference(
    saved: SavedAdapter,
    rank: int,
    *,
    base: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
) -> Factors:
    """Return the best low-rank updates of the base's original weights, in fp32, for an adapter of any method.

    Args:
        saved: an adapter whose owner can merge it.
        rank: largest rank of a module.
        base: current location of its base; None: as recorded.

    Raises:
        InputError: the method cannot be merged, or changes something other than weights of linears.
    """
    check_plain(saved, "LoRA", exporting=True)
    loaded, task = open_base(
        saved, base, quantization="none", precision="fp32", device=device, allow_other_base=allow_other_base
    )
    pool = AdapterPool(loaded, task=task)
    pool.load("adapter", saved.directory, allow_other_base=allow_other_base)
    before = original_weights(pool.model)
    pool.merge("adapter")
    factors: Factors = {}
    for name, value in pool.model.named_parameters():
        old = before[name].to(value.dtype)
        if old.shape == value.shape and old.equal(value):
            continue
        path, _, kind = name.rpartition(".")
        if kind != "weight" or not isinstance(pool.model.get_submodule(path), nn.Linear) or old.shape != value.shape:
            raise InputError(f"{saved.directory}: it changes '{name}', which LoRA cannot: merge it: --for merged")
        factors[path] = decomposed(value - old, rank)
    if not factors:
        raise InputError(f"{saved.directory}: merging changes no weight of the base.")
    return factors


def decomposed(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the nearest matrix of at most `rank` to an update [out, in]."""
    rank = min(rank, *delta.shape)
    if min(delta.shape) <= EXACT_SVD:
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        return tuple(t.cpu() for t in split(u, s, v, rank))  # type: ignore[return-value]
    with torch.random.fork_rng(devices=[delta.device] if delta.device.type == "cuda" else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, q=min(rank + 16, *delta.shape), niter=4)
    return tuple(t.cpu() for t in split(u, s, v.T, rank))  # type: ignore[return-value]


def plain_updates(saved: SavedAdapter, wanted: Wanted) -> tuple[Factors, bool]:
    """Return an adapter's low-rank updates, and whether they are an approximation.

    Raises:
        InputError: the adapter is not a sum of low-rank updates, and no rank is given.
    """
    program = PROGRAMS[wanted.target]
    if wanted.target != "peft":
        check_language_model(saved, program)
    try:
        factors = factors_of(saved, program, exporting=True)
    except InputError:
        if wanted.rank is None:
            raise
        found = factors_of_difference(
            saved, wanted.rank, base=wanted.base, device=wanted.device, allow_other_base=wanted.allow_other_base
        )
        return found, True
    if wanted.rank is None or largest_rank(factors) <= wanted.rank:
        return factors, False
    return truncated(factors, wanted.rank), True
