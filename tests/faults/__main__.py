"""`make faults`: brings every fault about, and ends with a table: tried, survived, lost. Exit code 1 if any is lost.

python -m tests.faults [--kills 100] [--every 1] [--seed 0] [KIND …]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .damage import damage
from .disk import failing_disk
from .harness import Outcome, Shop, tally
from .kills import kills
from .surroundings import surroundings
from .training import training


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="kills, disk, damage, training, surroundings")
    parser.add_argument("--kills", type=int, default=100, help="so many SIGKILLs")
    parser.add_argument(
        "--every", type=int, default=1, help="of disk operations, damaged files and surroundings try every n-th"
    )
    parser.add_argument("--late", type=int, default=500, help="the late step at which memory runs out")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills, and the bytes that flip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="budwood-faults-") as folder:
        shop = Shop(Path(folder))
        parts = {
            "kills": lambda: kills(shop, options.kills, options.seed),
            "disk": lambda: failing_disk(shop, options.every),
            "damage": lambda: damage(shop, options.every, options.seed),
            "training": lambda: training(shop, options.late),
            "surroundings": lambda: surroundings(shop, options.every),
        }
        outcomes: list[Outcome] = []
        for name in options.kinds or parts:
            outcomes += _shown(name, parts[name]())
    table, lost = tally(outcomes)
    print(table)
    return 1 if lost else 0


def _shown(name: str, found: Iterator[Outcome]) -> Iterator[Outcome]:
    start, count = time.monotonic(), 0
    for count, outcome in enumerate(found, 1):
        if sys.stderr.isatty() or outcome.lost:
            end = "\n" if outcome.lost else "\r"
            print(f"{name} {count}: {outcome.what[:70]} {outcome.lost}", end=end, file=sys.stderr)
        yield outcome
    print(f"{name}: {count} in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
