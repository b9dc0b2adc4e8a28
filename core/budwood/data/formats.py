"""Data formats, which map the columns of a row to an item that a task can encode.

Plugins register further ones in the entry point group budwood.formats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import installed
from budwood.contract.loading import create
from budwood.contract.strategy import Plugin
from budwood.data.reading import Row
from budwood.data.sources import Data, read_rows
from budwood.errors import BudwoodError, InputError, did_you_mean
from budwood.untrusted.redaction import shorten

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Range of the positive normal fp32 numbers."""
GROUP = "budwood.formats"
ROLES = ("system", "developer", "user", "assistant")
CAUSAL_LM, CLASSIFICATION = "causal-lm", "sequence-classification"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row without anything to learn from, and a short reason, by which such rows are counted."""

    reason: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion."""

    prompt: str
    completion: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and the name of its class."""

    text: str
    label: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with role and content; an assistant's message may carry a weight."""

    messages: Sequence[Mapping[str, Any]]


class DataFormat(Plugin):
    """Base class of data formats. A file has this format if it has all its `columns`."""

    group = GROUP
    must_declare = ("name", "columns", "tasks")
    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    tasks: ClassVar[tuple[str, ...]]
    """Tasks that encode its items."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that are read if they are present."""

    def item(self, row: Row, where: str) -> Any:
        """Convert a row to the item that the task encodes, or to a `Dropped`; by default return the row itself.

        Args:
            row: values by column.
            where: the row's location, with which messages begin.

        Raises:
            InputError: a field is missing, null or of the wrong type.
        """
        return row

    def reference(self, row: Row) -> str | None:
        """Return the correct answer to the row's prompt; None if there is no prompt."""
        return None


class PromptCompletion(DataFormat):
    """A prompt and its completion; the loss is on the completion and the end-of-sequence token."""

    api = 2
    name = "prompt-completion"
    columns = ("prompt", "completion")
    optional = ("weight",)
    tasks = (CAUSAL_LM,)

    def item(self, row: Row, where: str) -> Completion | Dropped:
        """See `DataFormat.item`."""
        blank = [name for name in self.columns if not string(row, name, where).strip()]
        if blank:
            return Dropped(f"empty {blank[-1]}")
        return _weighted(Completion(row["prompt"], row["completion"], read_weight(row, where)))

    def reference(self, row: Row) -> str | None:
        """The completion."""
        return str(row["completion"])


class PlainText(DataFormat):
    """Plain text; the loss is on every token but the first, and on the end-of-sequence token."""

    api = 2
    name = "text"
    columns = ("text",)
    optional = ("weight",)
    tasks = (CAUSAL_LM,)

    def item(self, row: Row, where: str) -> Text | Dropped:
        """See `DataFormat.item`."""
        text = string(row, "text", where)
        return _weighted(Text(text, read_weight(row, where))) if text.strip() else Dropped("empty text")


class TextLabel(DataFormat):
    """A text and its class."""

    api = 2
    name = "text-label"
    columns = ("text", "label")
    optional = ("weight",)
    tasks = (CLASSIFICATION,)

    def item(self, row: Row, where: str) -> Labelled | Dropped:
        """See `DataFormat.item`."""
        text, label = string(row, "text", where), row.get("label")
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise InputError(f"{where}: field 'label' must be text or a whole number, not {_kind(row, 'label')}.")
        if not text.strip():
            return Dropped("empty text")
        if not str(label).strip():
            return Dropped("empty label")
        return _weighted(Labelled(text, str(label).strip(), read_weight(row, where)))


class Messages(DataFormat):
    """A conversation; the loss is on the assistant's turns and the end token of each.

    A row's weight multiplies the weights of its messages.
    """

    api = 2
    name = "messages"
    columns = ("messages",)
    optional = ("weight",)
    tasks = (CAUSAL_LM,)

    def item(self, row: Row, where: str) -> Conversation | Dropped:
        """See `DataFormat.item`."""
        messages = _check_messages(row, where)
        weight = read_weight(row, where)
        reason = _unusable(messages, where)
        if reason is not None or not weight:
            return Dropped(reason or "weight 0")
        return Conversation([_times(m, weight, where) if m["role"] == "assistant" else m for m in messages])

    def reference(self, row: Row) -> str | None:
        """The assistant's first turn."""
        return next((str(m["content"]) for m in row["messages"] if m["role"] == "assistant"), None)


def read_weight(row: Row, where: str) -> float:
    """Return the `weight` of a row or message, a factor of its labels' loss; 1 if it has none.

    Raises:
        InputError: it is not a non-negative fp32 number, nor the text of one (as in CSV).
    """
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (weight == 0 or _SMALLEST <= weight <= _LARGEST):
        raise InputError(f"{where}: field 'weight' must be 0 or a positive fp32 number, not {shorten(repr(value))}.")
    return weight


def _times(message: Row, weight: float, where: str) -> Row:
    """Return a message with its weight multiplied by `weight`."""
    if weight == 1:
        return message
    return {**message, "weight": read_weight({"weight": weight * read_weight(message, where)}, where)}


def _weighted(item: Any) -> Any:
    return item if item.weight else Dropped("weight 0")


def check_rows(data: Data, task: str) -> None:
    """Check a file's fields without a tokenizer, so that errors show before a run spends time on loading.

    Raises:
        InputError: the file is unreadable or malformed, has no data format that the task accepts, or all its rows
            would be dropped.
    """
    rows = read_rows(data)
    data_format = recognise(rows.columns, task, str(rows.path))
    reasons: Counter[str] = Counter()
    for index, row in enumerate(rows):
        with attribute_errors(data_format, "item"):
            item = data_format.item(row, rows.location(index))
        reasons[item.reason if isinstance(item, Dropped) else ""] += 1
    if "" not in reasons:
        raise InputError(all_dropped(rows.path, reasons))


def all_dropped(path: Path | str, reasons: Mapping[Any, int]) -> str:
    """Return the message for a file all of whose rows were dropped, with the count of each reason."""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    return f"{path}: all of its {sum(reasons.values()):,} rows were dropped: {counts}."


def recognise(columns: Sequence[str], task: str, where: str) -> DataFormat:
    """Return the one data format of `task` whose columns a file has.

    If the columns of a match are a subset of another's (text, and text with label), the larger match wins.

    Raises:
        InputError: no format matches, several do, or the match is for another task; the message lists the accepted
            ones.
    """
    formats, broken = _installed_formats()
    matches = [f for f in formats if set(f.columns) <= set(columns)]
    matches = [f for f in matches if not any(set(f.columns) < set(other.columns) for other in matches)]
    matches = [f for f in matches if task in f.tasks] or matches
    here = ", ".join(f"'{name}'" for name in columns) or "none"
    if len(matches) > 1:
        names = " and as ".join(_spell(data_format) for data_format in matches)
        raise InputError(f"{where}: columns {here} can be read as {names}. Keep the columns of only one of them.")
    if not matches:
        accepted = "; ".join(_spell(data_format) for data_format in formats)
        raise InputError(
            f"{where}: columns {here} match no data format.{_nearest(columns, formats)} Accepted: {accepted}.{broken}"
        )
    data_format = matches[0]
    if task in data_format.tasks:
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


def _installed_formats() -> tuple[list[DataFormat], str]:
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
    """Name the column that is missing from the closest format, or misspelt."""
    partial = [(f, [name for name in f.columns if name not in columns]) for f in formats]
    partial = [(f, missing) for f, missing in partial if len(missing) < len(f.columns)]
    if partial:
        data_format, missing = min(partial, key=lambda pair: len(pair[1]))
        return f" {_spell(data_format)} lacks '{missing[0]}'."
    guesses = (did_you_mean(name, [known for f in formats for known in f.columns]) for name in columns)
    return next(filter(None, guesses), "")


def string(row: Row, field: str, where: str) -> str:
    """Return the text of a field.

    Raises:
        InputError: it is missing, null, not text, or not encodable as UTF-8.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{field}' must be text, not {_kind(row, field)}.")
    return _encodable(value, f"field '{field}'", where)


def _encodable(text: str, field: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {field} has half a character (\\u{ord(text[error.start]):04x}).") from error
    return text


def _kind(row: Row, field: str) -> str:
    if field not in row:
        return "missing"
    value = row[field]
    return "null" if value is None else f"a {type(value).__name__}"


def _check_messages(row: Row, where: str) -> list[dict[str, Any]]:
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise InputError(f"{where}: field 'messages' must be a list, not {_kind(row, 'messages')}.")
    if not messages:
        raise InputError(f"{where}: field 'messages' is empty.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InputError(f"{where}: message {number} must be an object with role and content.")
        role = message.get("role")
        if not isinstance(role, str):
            raise InputError(f"{where}: message {number}: 'role' must be text, not {_kind(message, 'role')}.")
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) or f" Known: {', '.join(ROLES)}."
            raise InputError(f"{where}: message {number}: unknown role '{role}'.{hint}")
        if message.get("tool_calls"):
            raise InputError(f"{where}: message {number}: tool calls are not supported.")
        content = message.get("content")
        if not isinstance(content, str):
            raise InputError(f"{where}: message {number}: 'content' must be text, not {_kind(message, 'content')}.")
        _encodable(content, f"message {number}", where)
    return messages


def _unusable(messages: Sequence[Row], where: str) -> str | None:
    for number, message in enumerate(messages, 1):
        weight = read_weight(message, f"{where}: message {number}")
        if weight != 1 and message["role"] != "assistant":
            raise InputError(f"{where}: message {number}: only an assistant message may have a weight.")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return "no assistant turn"
    if messages[0]["role"] == "assistant":
        return "begins with the assistant"
    if not all(message["content"].strip() for message in answers):
        return "empty assistant turn"
    return None if any(read_weight(message, where) for message in answers) else "weight 0"
