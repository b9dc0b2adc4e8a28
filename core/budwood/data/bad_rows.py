"""Rows that cannot be read or used: the first one is refused, or all are skipped, counted and kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from budwood.errors import InputError

Skipped = tuple[str, str, Any]
"""A skipped row: its location, why, and its content (the line's text if it is not a row)."""


class BadRows:
    """What to do with rows that raise an InputError.

    Attributes:
        skip: skip them; otherwise the first one is refused.
        rows: those that were skipped, in the order in which they were met.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.rows: list[Skipped] = []

    def meet(self, error: InputError, where: str, content: Any) -> None:
        """Note a bad row, or raise its error."""
        if not self.skip:
            raise error
        self.rows.append((where, str(error).removeprefix(where).lstrip(": "), content))


def count_reasons(skipped: Iterable[Sequence[Any]]) -> tuple[dict[str, int], dict[str, str]]:
    """Count skipped rows by reason, most frequent first; also return the location of the first of each.

    Numbers in a reason (a column, a message's place) are written as N, so that rows of one kind are counted together.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for where, reason, _ in skipped:
        kind = re.sub(r"(?<![\w-])\d+(?![\w-])", "N", reason.rstrip("."))
        counts[kind] += 1
        first.setdefault(kind, where)
    return dict(counts.most_common()), first


def skipped_lines(skipped: Iterable[Sequence[Any]]) -> bytes:
    """Return skipped rows as JSON Lines with where, reason and row."""
    rows = ({"where": where, "reason": reason, "row": row} for where, reason, row in skipped)
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode(errors="replace")
