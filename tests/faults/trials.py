"""One kind of fault, or a share of one, tried in a process of its own."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .damage import damage
from .disk import failing_disk
from .harness import Outcome, Shop
from .kills import kills
from .surroundings import surroundings
from .training import training

KINDS = ("disk", "kills", "training", "damage", "surroundings")
"""The longest first, so that workers end together."""


def attempt(kind: str, share: int, shares: int, options: argparse.Namespace) -> list[Outcome]:
    """Try one kind of fault, or one share of it, on runs of its own."""
    every, start = options.every, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="budwood-faults-") as folder:
        shop = Shop(Path(folder))
        found: Iterator[Outcome]
        if kind == "disk":
            found = failing_disk(shop, every * shares, 1 + (every > 1) + every * share)
        elif kind == "kills":
            found = kills(shop, options.kills, options.seed)
        elif kind == "training":
            found = training(shop, options.late)
        elif kind == "damage":
            found = damage(shop, every, options.seed)
        else:
            found = surroundings(shop, every)
        outcomes = []
        for outcome in found:
            outcomes.append(outcome)
            if outcome.lost:
                print(f"{kind} {len(outcomes)}: {outcome.what[:70]} {outcome.lost}", file=sys.stderr)
    print(f"{kind}: {len(outcomes)} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return outcomes
