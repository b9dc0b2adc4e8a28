"""Chooses the part of the training data that a run holds out for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

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
    class is held out in proportion, and at least one unit of it is left for training.

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
        return _none("rows that must stay together (groups, equal rows) are more than the part to hold out")
    indices = np.flatnonzero(chosen)
    rows = np.unique(examples.row_numbers[indices])
    details = f"{len(np.unique(units[indices])):,} groups by {group_by}" if group_by else f"{len(rows):,} rows"
    details += ", in proportion to the classes" if examples.labels else ""
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
    """Return which examples are held out, [n] bool; at most `wanted`, and never all units of a class."""
    numbers, first, sizes = np.unique(units, return_index=True, return_counts=True)
    classes = np.array([_class(examples, int(i)) for i in first]) if examples.labels else np.zeros(len(first), int)
    order = np.random.default_rng([seed, len(units)]).permutation(len(numbers))
    totals = np.bincount(classes, weights=sizes)
    quotas = _shares(totals, wanted)
    left = np.bincount(classes)
    held = np.zeros(len(numbers), dtype=bool)
    for unit in order:
        kind = classes[unit]
        if sizes[unit] <= quotas[kind] and left[kind] > 1:
            held[unit], quotas[kind], left[kind] = True, quotas[kind] - sizes[unit], left[kind] - 1
    return held[np.searchsorted(numbers, units)]


def _shares(totals: np.ndarray, wanted: int) -> np.ndarray:
    """Distribute `wanted` over classes in proportion to `totals`, by largest remainders."""
    exact = totals * wanted / max(totals.sum(), 1)
    shares = np.floor(exact).astype(int)
    for kind in np.argsort(shares - exact, kind="stable")[: wanted - shares.sum()]:
        shares[kind] += 1
    return shares


def _class(examples: Examples, index: int) -> int:
    labels = examples[index].labels
    return int(labels[0]) if len(labels) else 0


def _column_hashes(examples: Examples, column: str, where: str) -> np.ndarray:
    """Return a hash of a column's value for each row, [rows] uint64; a row without a value gets a unique one."""
    rows = examples.rows
    if column not in rows.columns:
        raise InputError(f"{where}: {examples.path} has no column '{column}': it has {', '.join(rows.columns)}.")
    hashes = np.empty(len(rows), dtype=np.uint64)
    for index, row in enumerate(rows):
        value = row.get(column)
        text = f"row {index}" if value is None else "value " + json.dumps(value, sort_keys=True, default=str)
        hashes[index] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return hashes
