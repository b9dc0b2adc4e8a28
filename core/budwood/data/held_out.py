"""Chooses the part of the training data that a run holds out for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from budwood.data.examples import Examples
from budwood.errors import InputError, plural

SHARE, LEAST, MOST = 0.05, 10, 500
"""Fraction of the examples that is held out, and the limits of their number."""
SMALLEST = 100
"""With fewer examples nothing is held out: 5 % of them would measure nothing."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out part.

    Attributes:
        indices: [m] int64, the examples held out, ascending; may be empty.
        rows: [r] int64, their rows, ascending.
        note: what was held out, or why nothing was, for the user.
    """

    indices: np.ndarray
    rows: np.ndarray
    note: str

    def split(self, examples: Examples) -> tuple[Examples, Examples | None]:
        """Return the examples to train on, and those held out if there are any."""
        if not len(self.indices):
            return examples, None
        rest = np.setdiff1d(np.arange(len(examples)), self.indices)
        return examples.select(rest), examples.select(self.indices)


def hold_out(examples: Examples, seed: int, group_by: str | None = None, where: str = "data.group_by") -> HeldOut:
    """Choose the examples that a run holds out: 5 %, at least 10 and at most 500; the seed decides which.

    Examples of one row, of one group, with equal inputs, or with one value of column `group_by` stay together. Each
    class is held out in proportion, as far as they allow, and at least one example of it is left for training.

    Args:
        group_by: a column of the data; rows without a value in it are separate.
        where: place of `group_by` in the recipe, for messages.

    Raises:
        InputError: the data has no column `group_by`.
    """
    count = len(examples)
    units = _units(examples, group_by, where)
    if count < SMALLEST:
        return _none(f"the data has only {plural(count, 'example')}, fewer than {SMALLEST}")
    wanted = min(max(round(SHARE * count), LEAST), MOST)
    chosen = _choose(units, examples, wanted, seed)
    if not chosen.any():
        return _none(
            "rows that must stay together (groups, equal rows) are more than the part to hold out, or all of a class"
        )
    indices = np.flatnonzero(chosen)
    rows = np.unique(examples.row_numbers[indices])
    details = f"{len(np.unique(units[indices])):,} groups by {group_by}" if group_by else f"{len(rows):,} rows"
    details += ", in proportion to the classes" if examples.labels else ""
    details += ", as far as groups allow" if examples.labels and group_by else ""
    note = (
        f"held out for evaluation: {len(indices):,} of {count:,} examples ({details}); "
        "data.eval: none trains on them too"
    )
    return HeldOut(indices, rows, note)


def rows_held_out(examples: Examples, rows: Sequence[int]) -> HeldOut:
    """Return the held-out part that consists of the given rows, chosen by an earlier `hold_out`.

    Raises:
        InputError: the data has no example of any of the rows.
    """
    numbers = np.asarray(rows, dtype=np.int64)
    indices = np.flatnonzero(np.isin(examples.row_numbers, numbers))
    if not len(indices):
        raise InputError(f"{examples.path}: none of the held-out rows yields an example with these settings.")
    note = f"held out for evaluation: {len(indices):,} of {len(examples):,} examples, as in the run"
    missing = len(np.setdiff1d(numbers, examples.row_numbers[indices]))
    note += f"; {missing:,} of its held-out rows yield no example with these settings" if missing else ""
    return HeldOut(indices, numbers, note)


def _none(reason: str) -> HeldOut:
    empty = np.zeros(0, dtype=np.int64)
    return HeldOut(empty, empty, f"note: nothing was held out, so nothing is evaluated: {reason}; set data.eval")


def _units(examples: Examples, group_by: str | None, where: str) -> np.ndarray:
    """Return the unit of each example, [n]: the smallest index of the examples it stays together with."""
    parts = [examples.row_numbers, examples.groups, examples.input_hashes]
    if group_by is not None:
        parts.append(_column_hashes(examples, group_by, where)[examples.row_numbers])
    labellings = [np.unique(part, return_inverse=True)[1] for part in parts]
    units = np.arange(len(examples))
    while True:
        before = units
        for labelling in labellings:
            smallest = np.full(len(units), len(units))
            np.minimum.at(smallest, labelling, units)
            units = smallest[labelling]
        if np.array_equal(units, before):
            return units


def _choose(units: np.ndarray, examples: Examples, wanted: int, seed: int) -> np.ndarray:
    """Return which examples are held out, [n] bool: at most `wanted`, whole units, and never the last of a class.

    The next unit is, in random order, one of the class that lacks most of its share; a unit is of its first example's
    class. One that fits into what is wanted is held out even if it exceeds that share.
    """
    numbers, first, places, sizes = np.unique(units, return_index=True, return_inverse=True, return_counts=True)
    classes = _classes(examples)
    left = np.bincount(classes)
    lacking = _shares(left, wanted).astype(float)
    members, ends = np.argsort(places, kind="stable"), np.cumsum(sizes)
    waiting: dict[int, list[int]] = {}
    for unit in reversed(np.random.default_rng([seed, len(units)]).permutation(len(numbers))):
        waiting.setdefault(int(classes[first[unit]]), []).append(int(unit))
    held, room, smallest = np.zeros(len(numbers), dtype=bool), wanted, sizes.min()
    while waiting and room >= smallest:
        kind = int(lacking.argmax())
        queue = waiting.get(kind, [])
        while queue and sizes[queue[-1]] > room:
            queue.pop()
        if not queue:
            lacking[kind] = -np.inf
            waiting.pop(kind, None)
            continue
        unit = queue.pop()
        counts = np.bincount(classes[members[ends[unit] - sizes[unit] : ends[unit]]], minlength=len(left))
        if (left[counts > 0] > counts[counts > 0]).all():
            held[unit], room = True, room - int(sizes[unit])
            lacking, left = lacking - counts, left - counts
    return held[places]


def _shares(totals: np.ndarray, wanted: int) -> np.ndarray:
    """Distribute `wanted` over classes in proportion to `totals`, by largest remainders."""
    exact = totals * wanted / max(totals.sum(), 1)
    shares = np.floor(exact).astype(int)
    for kind in np.argsort(shares - exact, kind="stable")[: wanted - shares.sum()]:
        shares[kind] += 1
    return shares


def _classes(examples: Examples) -> np.ndarray:
    """Return the class of each example, [n] int64: that of its first label; 0 without classes."""
    if not examples.labels:
        return np.zeros(len(examples), dtype=np.int64)
    labels = examples.label_values
    return np.array([next(iter(labels[index]), 0) for index in range(len(labels))], dtype=np.int64)


def _column_hashes(examples: Examples, column: str, where: str) -> np.ndarray:
    """Return a hash of a column's value for each row, [rows] uint64; a row without a value gets a unique one."""
    rows = examples.rows
    if column not in rows.columns:
        raise InputError(f"{where}: {examples.path} has no column '{column}': it has {', '.join(rows.columns)}.")
    hashes = np.empty(len(rows), dtype=np.uint64)
    for index, row in enumerate(rows):
        value = row.get(column)
        text = "value " + json.dumps(value, sort_keys=True, default=str) if _is_value(value) else f"row {index}"
        hashes[index] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return hashes


def _is_value(value: Any) -> bool:
    """Return whether a field has a value; null, NaN and blank text, as of an empty cell, are none."""
    return value is not None and value == value and not (isinstance(value, str) and not value.strip())
