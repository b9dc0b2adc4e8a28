"""Data formats: what a file's columns mean, and each row as an item that a task can encode.

Others come through entry points, group budwood.formats.
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
from budwood.data.reading import Row, read_rows
from budwood.errors import BudwoodError, InputError, did_you_mean
from budwood.untrusted.redaction import shorten

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The normal numbers of fp32 above 0."""
GROUP = "budwood.formats"
ROLES = ("system", "developer", "user", "assistant")
CAUSAL_LM, CLASSIFICATION = "causal-lm", "sequence-classification"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that nothing can be learned from, and why, in a few words that are counted."""

    reason: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it."""

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
    """What every data format provides. A file is in it if it has all its columns."""

    group = GROUP
    must_declare = ("name", "columns", "tasks")
    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    tasks: ClassVar[tuple[str, ...]]
    """Tasks that encode its items."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that are read if they are there."""

    def item(self, row: Row, where: str) -> Any:
        """Turn a row into what the task encodes, or a `Dropped`; by default the row itself.

        Args:
            row: values by column.
            where: the row's place, which leads messages.

        Raises:
            InputError: a field is missing, null or of the wrong type.
        """
        return row

    def reference(self, row: Row) -> str | None:
        """What a right answer to the row's prompt would be, or None if there is no prompt."""
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
        return _weighted(Labelled(text, str(label), read_weight(row, where)))


class Messages(DataFormat):
    """A conversation; the loss is on the assistant's turns and the token that ends each of them.

    A row's weight multiplies those of its messages.
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
    """A row's or message's `weight`, the factor of its labels in the loss; 1 if there is none.

    Raises:
        InputError: it is not a number from 0 that fp32 holds, or text that is one, as CSV has.
    """
    given = row.get("weight")
    if given is None or given == "":
        return 1.0
    try:
        weight = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (weight == 0 or _SMALLEST <= weight <= _LARGEST):
        raise InputError(f"{where}: field 'weight' must be a finite number from 0 (got {shorten(repr(given))}).")
    return weight


def _times(message: Row, weight: float, where: str) -> Row:
    """A message whose weight is `weight` times its own."""
    if weight == 1:
        return message
    return {**message, "weight": read_weight({"weight": weight * read_weight(message, where)}, where)}


def _weighted(item: Any) -> Any:
    return item if item.weight else Dropped("weight 0")


def check_rows(path: str | Path, task: str) -> None:
    """Look through a file's fields, without a tokenizer, for what would end a run after a long wait.

    Raises:
        InputError: unreadable, malformed, of no form that the task takes, or without a row to learn from.
    """
    rows = read_rows(path)
    data_format = recognise(rows.columns, task, str(rows.path))
    reasons: Counter[str] = Counter()
    for index, row in enumerate(rows):
        with attribute_errors(data_format, "item"):
            item = data_format.item(row, rows.location(index))
        reasons[item.reason if isinstance(item, Dropped) else ""] += 1
    if "" not in reasons:
        raise InputError(all_dropped(rows.path, reasons))


def all_dropped(path: Path, reasons: Mapping[Any, int]) -> str:
    """The line that says that no row of a file is left, and why."""
    told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    return f"{path}: all of its {sum(reasons.values()):,} rows were dropped: {told}."


def recognise(columns: Sequence[str], task: str, where: str) -> DataFormat:
    """Find the one data format of `task` whose columns a file has.

    A format whose columns are a subset of another match's (text, beside text and label) yields to it.

    Raises:
        InputError: no format matches, several do, or one of another task; the message says what is accepted.
    """
    formats, broken = _installed_formats()
    found = [f for f in formats if set(f.columns) <= set(columns)]
    found = [f for f in found if not any(set(f.columns) < set(other.columns) for other in found)]
    found = [f for f in found if task in f.tasks] or found
    here = ", ".join(f"'{name}'" for name in columns) or "none"
    if len(found) > 1:
        names = " and as ".join(_spell(data_format) for data_format in found)
        raise InputError(f"{where}: columns {here} can be read as {names}. Leave the columns of one of them only.")
    if not found:
        accepted = "; ".join(_spell(data_format) for data_format in formats)
        raise InputError(
            f"{where}: columns {here} are not understood.{_nearest(columns, formats)} Accepted: {accepted}.{broken}"
        )
    data_format = found[0]
    if task in data_format.tasks:
        return data_format
    remedy = f"Set base.task: {data_format.tasks[0]}"
    narrower = [f for f in formats if task in f.tasks and set(f.columns) < set(data_format.columns)]
    if narrower:
        extra = " and ".join(f"'{name}'" for name in data_format.columns if name not in narrower[0].columns)
        remedy += f", or remove {extra} to train on {_spell(narrower[0])} alone"
    else:
        wanted = "; ".join(_spell(f) for f in formats if task in f.tasks)
        remedy += f", or give {wanted}" if wanted else ""
    raise InputError(
        f"{where}: {_spell(data_format)} is data for {data_format.tasks[0]}, but the task is {task}. {remedy}."
    )


def _installed_formats() -> tuple[list[DataFormat], str]:
    """Every format that loads, and a sentence on those that do not: it matters only if no other format fits."""
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
    """Say which column is missing, or misspelt, in the nearest format."""
    partly = [(f, [name for name in f.columns if name not in columns]) for f in formats]
    near = [(f, missing) for f, missing in partly if len(missing) < len(f.columns)]
    if near:
        data_format, missing = min(near, key=lambda pair: len(pair[1]))
        return f" {_spell(data_format)} lacks '{missing[0]}'."
    guesses = (did_you_mean(name, [known for f in formats for known in f.columns]) for name in columns)
    return next(filter(None, guesses), "")


def string(row: Row, field: str, where: str) -> str:
    """The text of a field.

    Raises:
        InputError: it is missing, null, not text, or text that no encoding can hold.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{field}' must be text, not {_kind(row, field)}.")
    return _encodable(value, f"field '{field}'", where)


def _encodable(text: str, what: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {what} has half a character (\\u{ord(text[error.start]):04x}).") from error
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
        raise InputError(f"{where}: field 'messages' is an empty list.")
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
            raise InputError(f"{where}: message {number}: only an assistant's message takes a weight.")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return "no assistant turn"
    if messages[0]["role"] == "assistant":
        return "begins with the assistant"
    if not all(message["content"].strip() for message in answers):
        return "empty assistant turn"
    return None if any(read_weight(message, where) for message in answers) else "weight 0"
