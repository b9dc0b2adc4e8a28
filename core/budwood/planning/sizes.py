"""Chooses the size of micro-batches, by rehearsing the largest of a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from budwood.planning.rehearsal import Rehearsal
from budwood.planning.trace import Operation
from budwood.training.micro_tokens import ROUND, largest_group

ROOM = 0.9
"""Share of the memory to use: the caching allocator of CUDA reserves up to a tenth more than is allocated."""
ATTEMPTS = 4
"""Sizes that are rehearsed."""


class Measured(Protocol):
    """The memory of a rehearsed step, in bytes, and what of it grows with the size of micro-batches."""

    @property
    def needed(self) -> int: ...
    @property
    def work(self) -> int: ...
    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch."""

    @property
    def operations(self) -> Sequence[Operation]:
        """Of the step."""


M = TypeVar("M", bound=Measured)


def guess(memory: float, result: Measured, before: Measured | None = None) -> int:
    """Return the size that should take `memory` bytes: on the line through two sizes, or with work in proportion."""
    slope = result.work / result.tokens
    if before is not None and before.tokens != result.tokens:
        slope = (before.needed - result.needed) / (before.tokens - result.tokens)
    return int(result.tokens + (memory - result.needed) / slope) // ROUND * ROUND if slope > 0 else 0


def choose(rehearsal: Rehearsal, kind: str, memory: int, measure: Callable[[], M]) -> M:
    """Split a rehearsed run into micro-batches of the largest useful size that fits; returns what was measured for it.

    The size is never below that of the largest group of examples. If that does not fit, it is what is returned.

    Args:
        kind: cpu or cuda.
        memory: bytes of the device.
        measure: rehearses a step of the run as it is split.
    """
    lowest = largest_group(rehearsal.lengths, rehearsal.groups)
    size = max(rehearsal.wanted(kind), lowest)
    result: M | None = None
    for left in reversed(range(ATTEMPTS)):
        rehearsal.split(size)
        before, result = result, measure()
        if result.needed <= ROOM * memory or size <= lowest:
            break
        size = max(lowest, min(guess(ROOM * memory, result, before), size - ROUND)) if left > 1 else lowest
    assert result is not None
    return result
