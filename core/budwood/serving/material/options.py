"""Options of a combination of adapters. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from budwood.errors import InputError, did_you_mean

METHODS = ("linear", "svd", "ties", "dare", "magnitude")
PRUNING = ("ties", "dare", "magnitude")


def check_combination(
    count: int,
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    density: float | None,
    seed: int | None,
) -> None:
    """Check the options of `combine` for so many adapters.

    Raises:
        InputError: one is out of range, or has no effect with the method.
    """
    if count < 2:
        raise InputError("combine: give at least two adapters.")
    if method not in METHODS:
        raise InputError(f"--method {method}: choose one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    if weights is not None and len(weights) != count:
        raise InputError(f"--weights: {len(weights)} for {count} adapters: give one for each.")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise InputError("--weights: must be finite numbers.")
    if weights is not None and not any(weights):
        raise InputError("--weights: all are 0, so nothing would be left.")
    if rank is not None and method == "linear":
        raise InputError("--rank: linear is exact, with the sum of the ranks: use --method svd, or leave --rank out.")
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank}: must be at least 1.")
    if density is not None and method not in PRUNING:
        raise InputError(f"--density: has no effect with --method {method}: leave it out.")
    if seed is not None and method != "dare":
        raise InputError(f"--seed: has no effect with --method {method}: leave it out.")
    if density is not None and not 0 < density <= 1:
        raise InputError(f"--density {density}: must be above 0 and at most 1.")
