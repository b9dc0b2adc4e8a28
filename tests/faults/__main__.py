"""`make faults`: injects every fault, and prints a table: tried, survived, lost. Exit code 1 if any is lost.

python -m tests.faults [--kills 100] [--every 1] [--seed 0] [--workers N] [KIND …]
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from .harness import Outcome, tally
from .trials import KINDS, attempt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--kills", type=int, default=100, help="number of SIGKILLs")
    parser.add_argument(
        "--every", type=int, default=1, help="try every n-th disk operation, damaged file and environment fault"
    )
    parser.add_argument("--late", type=int, default=500, help="late step at which memory runs out")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of kills and of the flipped bytes")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if not options.kinds or kind in options.kinds]
    # The disk operations are split into one share per process.
    parts = [(kind, share) for kind in kinds for share in range(options.workers if kind == "disk" else 1)]
    outcomes: list[Outcome] = []
    if len(parts) == 1 or options.workers == 1:
        outcomes = attempt(parts, options.workers, options)
    else:
        # Python's resource tracker warns about the semaphores of killed processes, and removes them.
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            trials = [pool.submit(attempt, [part], options.workers, options) for part in parts]
            for trial in trials:
                outcomes += trial.result()
    table, lost = tally(outcomes)
    print(table)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
