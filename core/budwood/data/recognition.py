"""Recognises a file's data format by its columns."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import installed
from budwood.contract.loading import create
from budwood.data.chat_formats import UNSUPPORTED, Unsupported
from budwood.data.formats import GROUP, DataFormat, Dropped, PlainText, all_dropped
from budwood.data.mixed import Mixed
from budwood.data.prompts import PROMPTS
from budwood.data.renames import suggest
from budwood.data.sources import Data, JoinedRows, read_rows
from budwood.data.unused import check_unused, find_unused
from budwood.errors import BudwoodError, InputError


def check_rows(data: Data, task: str, read: Mapping[str, str] | None = None) -> DataFormat:
    """Check a file's fields without a tokenizer, so that errors show before a run spends time on loading.

    Args:
        read: columns that strategies read; see `columns_read`.

    Returns:
        Its data format.

    Raises:
        InputError: the file is unreadable or malformed, has no data format that the task accepts, or all its rows
            would be dropped.
    """
    rows = read_rows(data)
    data_format = recognise_rows(rows, task)
    read = read or {}
    unused = find_unused(rows.columns, data_format, read)
    reasons: Counter[str] = Counter()
    for index, row in enumerate(rows):
        check_unused(row, unused, data_format, rows.location(index), read)
        with attribute_errors(data_format, "item"):
            item = data_format.item(row, rows.location(index))
        reasons[item.reason if isinstance(item, Dropped) else ""] += 1
    if "" not in reasons:
        raise InputError(all_dropped(rows.path, reasons))
    return data_format


def recognise_rows(rows: Any, task: str) -> DataFormat:
    """Return the data format of rows; of several files in different formats, one that reads each file as its own.

    Raises:
        InputError: see `recognise`; the message names the file.
    """
    parts = rows.parts if isinstance(rows, JoinedRows) else [rows]
    found: dict[tuple[str, ...], DataFormat] = {}
    for part in parts:
        key = tuple(part.columns)
        if key not in found:
            found[key] = recognise(part.columns, task, str(part.path), part)
    if len({each.name for each in found.values()}) == 1:
        return next(iter(found.values()))
    mixed = {str(part.path): found[tuple(part.columns)] for part in parts}
    if len({each.holds for each in mixed.values()}) > 1:
        kinds = {each.holds or "answers to learn": path for path, each in mixed.items()}
        told = " and ".join(f"{kind} ({path})" for kind, path in kinds.items())
        raise InputError(f"{rows.path}: a run trains on one kind of data, not on {told}.")
    return Mixed(mixed)


def recognise(columns: Sequence[str], task: str, where: str, rows: Any = ()) -> DataFormat:
    """Return the one data format of `task` whose columns a file has.

    If the columns of a match are a subset of another's (text, and text with label), the larger match wins. A column
    `text` beside another format is a rendering of it, or `check_unused` refuses the row.

    Args:
        where: the file's name in messages; `rows`: its rows, to tell whether each is of another format.

    Raises:
        InputError: no format matches, several do, or the match is for another task; the message lists the accepted
            ones.
    """
    formats, broken = installed_formats()
    own = {frozenset(f.columns) for f in formats}
    candidates = [*formats, *(other for other in UNSUPPORTED if frozenset(other.columns) not in own)]
    matches = [f for f in candidates if set(f.columns) <= set(columns)]
    matches = [f for f in matches if not any(_says_more(other, f, task) for other in matches)]
    matches = [f for f in matches if task in f.tasks or isinstance(f, Unsupported)] or matches
    if len(matches) > 1:
        matches = [f for f in matches if f.holds != PROMPTS]  # a prompt beside an answer is part of it
    if len(matches) > 1:
        matches = [f for f in matches if not isinstance(f, PlainText)]
        matches = [f for f in matches if f.holds] or matches  # UltraFeedback's `messages` repeats `chosen`
    if all(isinstance(f, Unsupported) for f in matches):
        matches = matches[:1]
    here = ", ".join(f"'{name}'" for name in columns) or "none"
    if len(matches) > 1:
        _check_rows_agree(rows, matches)
        names = " and as ".join(_spell(data_format) for data_format in matches)
        raise InputError(f"{where}: columns {here} can be read as {names}. Keep the columns of only one of them.")
    if not matches:
        own_task = [data_format for data_format in formats if task in data_format.tasks]
        accepted = "; ".join(_spell(data_format) for data_format in own_task or formats)
        known = {name for data_format in own_task or formats for name in data_format.columns}
        raise InputError(
            f"{where}: columns {here} match no data format.{suggest(columns, known) or _nearest(columns, formats)} "
            f"Accepted: {accepted}.{broken}"
        )
    data_format = matches[0]
    if isinstance(data_format, Unsupported):
        raise InputError(f"{where}: columns {_spell(data_format)} are {data_format.reason}")
    if task in data_format.tasks:
        if data_format.holds == PROMPTS and (remedy := suggest(columns)):
            data_format.instead = remedy.strip()  # type: ignore[misc]  # its answers have another name
        return data_format
    remedy = f"Set base.task: {data_format.tasks[0]}"
    narrower = [f for f in formats if task in f.tasks and set(f.columns) < set(data_format.columns)]
    if narrower:
        extra = " and ".join(f"'{name}'" for name in data_format.columns if name not in narrower[0].columns)
        remedy += f", or remove {extra} to train on {_spell(narrower[0])} alone"
    else:
        accepted = "; ".join(_spell(f) for f in formats if task in f.tasks)
        remedy += f", or give {accepted}" if accepted else ""
    raise InputError(
        f"{where}: {_spell(data_format)} is data for {data_format.tasks[0]}, but the task is {task}. {remedy}."
    )


def _check_rows_agree(rows: Any, matches: Sequence[DataFormat]) -> None:
    """Raise InputError if rows are of different formats, and none of two; it names the first row of each."""
    first: dict[str, str] = {}
    for index, row in enumerate(rows):
        found = [_spell(f) for f in matches if all(row.get(column) is not None for column in f.columns)]
        if len(found) > 1:
            return
        first |= {name: rows.location(index) for name in found if name not in first}
    if len(first) > 1:
        told = " and ".join(f"{name} ({location})" for name, location in first.items())
        raise InputError(f"rows of one file have different formats: {told}. Save each format in a file of its own.")


def _says_more(data_format: DataFormat, other: DataFormat, task: str) -> bool:
    """Return whether a format reads all columns of another and more, which are no metadata of the task's data."""
    elsewhere = data_format.metadata and task in other.tasks and task not in data_format.tasks
    return set(other.columns) < set(data_format.columns) and not elsewhere


def installed_formats() -> tuple[list[DataFormat], str]:
    """Return the formats that load, and the errors of the others, which matter only if no format matches."""
    formats: list[DataFormat] = []
    broken = ""
    for name in installed(GROUP):
        try:
            formats.append(create(name, GROUP))
        except BudwoodError as error:
            broken += f" {error}"
    return formats, broken


def _spell(data_format: DataFormat) -> str:
    return " + ".join(data_format.columns)


def _nearest(columns: Sequence[str], formats: Sequence[DataFormat]) -> str:
    """Name the column that is missing from the closest formats, or misspelt."""
    partial = [(f, [name for name in f.columns if name not in columns]) for f in formats]
    partial = [(f, missing) for f, missing in partial if len(missing) < len(f.columns)]
    if partial:
        fewest = min(len(missing) for _, missing in partial)
        lacking = [f"{_spell(f)} lacks '{missing[0]}'" for f, missing in partial if len(missing) == fewest]
        return f" {'; '.join(lacking)}."
    known = [name for f in formats for name in f.columns]
    # Only a misspelling is named: a column of another format is no misspelling of ours.
    near = ((name, difflib.get_close_matches(name, known, n=1, cutoff=0.85)) for name in columns)
    return next((f" Did you mean '{found[0]}' by '{name}'?" for name, found in near if found), "")
