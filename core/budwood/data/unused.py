"""Columns that a data format does not read: reported if they are metadata, refused if they have content."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from budwood.data.formats import CAUSAL_LM, DataFormat
from budwood.data.mixed import Mixed
from budwood.errors import InputError, did_you_mean

SAID = (
    "system", "system_prompt", "instruction", "input", "context", "history", "tools", "functions",
    "chat_template_kwargs", "thinking", "reasoning", "reasoning_content", "images", "image", "videos", "video",
    "audios", "audio", "documents", "chosen", "rejected", "function_call", "tool_calls",
)  # fmt: skip
"""Columns with content: a model trained without them is trained on something else."""
OTHERS = ("text", "prompt", "completion", "output", "response", "messages", "conversation", "conversations")
"""Columns that other formats read; beside a format they usually repeat its content, for example as a rendering."""


def columns_read(strategies: Sequence[Any]) -> dict[str, str]:
    """Return the columns that strategies read besides those of the data format, with the reader of each."""
    return {column: str(strategy) for strategy in strategies for column in strategy.reads_columns}


def find_unused(columns: Sequence[str], data_format: DataFormat, read: Collection[str] = ()) -> list[str]:
    """Return the columns that neither a data format nor, by `read`, a strategy reads."""
    formats = data_format.formats.values() if isinstance(data_format, Mixed) else [data_format]
    known = {*read, *(name for each in formats for name in (*each.columns, *each.optional))}
    return [name for name in columns if name not in known]


def check_unused(
    row: Mapping[str, Any], unused: Sequence[str], data_format: DataFormat, where: str, read: Mapping[str, str]
) -> None:
    """Refuse a row with new content in a column that is not read, or without a column that a strategy reads.

    Args:
        unused: see `find_unused`.
        where: the row's location.
        read: columns that strategies read; see `columns_read`.

    Raises:
        InputError: the row has, or lacks, such a column.
    """
    for name, reader in read.items():
        if row.get(name) is None:
            missing = "is null" if name in row else "is missing"
            near = did_you_mean(name, [other for other in row if other not in data_format.columns])
            raise InputError(f"{where}: field '{name}' {missing}; {reader} reads it.{near}")
    if isinstance(data_format, Mixed):
        data_format = data_format.at(where)
        unused = find_unused(list(row), data_format, read)
    names = SAID if CAUSAL_LM not in data_format.tasks else (*SAID, *OTHERS)
    for name in unused:
        if name not in names or row.get(name) in (None, "", [], {}):
            continue
        if name != "tools" and _repeats(row, row[name], data_format):
            continue
        remedy = "Rename it to 'system'" if name == "system_prompt" and "system" in data_format.optional else ""
        raise InputError(
            f"{where}: {' + '.join(data_format.columns)} does not read column '{name}', which would be left out. "
            f"{remedy or 'Move it to a column that is read'}, or remove it."
        )


def _repeats(row: Mapping[str, Any], value: Any, data_format: DataFormat) -> bool:
    """Return whether a value repeats the columns that are read: its texts are part of theirs, or theirs of its."""
    own = [text for name in (*data_format.columns, *data_format.optional) for text in _texts(row.get(name))]
    theirs = list(_texts(value))
    if not theirs:
        return False
    said, repeated = "\n".join(own), "\n".join(theirs)
    return all(text in said for text in theirs) or all(text in repeated for text in own)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value (itself, or the contents of messages), with white space collapsed."""
    if isinstance(value, str):
        if text := " ".join(value.split()):
            yield text
    elif isinstance(value, Mapping):
        for key in ("content", "value", "text"):
            yield from _texts(value.get(key))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
