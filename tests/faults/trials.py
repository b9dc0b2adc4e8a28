"""Tries one kind of fault, or a share of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .damage import damage
from .disk import failing_disk
from .harness import Outcome, Shop
from .kills import kills
from .surroundings import surroundings
from .training import training

KINDS = ("disk", "kills", "training", "damage", "surroundings")
"""The slowest first, so that workers finish at the same time."""


def attempt(parts: Sequence[tuple[str, int]], shares: int, options: argparse.Namespace) -> list[Outcome]:
    """Try kinds of faults, each whole or one share of it, on one base, in separate runs."""
    with tempfile.TemporaryDirectory(prefix="budwood-faults-") as folder:
        shop = Shop(Path(folder))
        return [outcome for kind, share in parts for outcome in _attempt(shop, kind, share, shares, options)]


def _attempt(shop: Shop, kind: str, share: int, shares: int, options: argparse.Namespace) -> list[Outcome]:
    every, start = options.every, time.monotonic()
    trials: Iterator[Outcome]
    if kind == "disk":
        trials = failing_disk(shop, every * shares, 1 + (every > 1) + every * share)
    elif kind == "kills":
        trials = kills(shop, options.kills, options.seed)
    elif kind == "training":
        trials = training(shop, options.late)
    elif kind == "damage":
        trials = damage(shop, every, options.seed)
    else:
        trials = surroundings(shop, every)
    outcomes = []
    for outcome in trials:
        outcomes.append(outcome)
        if outcome.lost:
            print(f"{kind} {len(outcomes)}: {outcome.what[:70]} {outcome.lost}", file=sys.stderr)
    print(f"{kind}: {len(outcomes)} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return outcomes
