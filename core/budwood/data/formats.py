"""Data formats, which map the columns of a row to an item that a task can encode.

Plugins register further ones in the entry point group budwood.formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from budwood.contract.strategy import Plugin
from budwood.data.fields import describe_type, read_weight, string
from budwood.data.rows import Row
from budwood.errors import InputError

GROUP = "budwood.formats"
CAUSAL_LM, CLASSIFICATION = "causal-lm", "sequence-classification"
REWARD_MODEL, MASKED_LM, SEQ2SEQ = "reward-model", "masked-lm", "sequence-to-sequence"


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
    metadata: ClassVar[tuple[str, ...]] = ()
    """Those of its columns that are often metadata in data of other tasks, such as a score: such a file is theirs."""
    holds: ClassVar[str] = ""
    """What its rows are if an objective must be made for them, such as "preference pairs"; see `Strategy.trains_on`."""
    instead: ClassVar[str] = ""
    """A sentence on how to train on such rows without an objective, for messages."""

    def item(self, row: Row, where: str) -> Any:
        """Convert a row to the item that the task encodes, or to a `Dropped`; by default return the row itself.

        Args:
            row: values by column.
            where: the row's location, with which messages begin.

        Raises:
            InputError: a field is missing, null or of the wrong type.
        """
        return row

    def files(self, row: Row, where: str) -> Sequence[Path]:
        """Return the files whose content belongs to a row, such as an image that it names by path.

        Core hashes them with the data, so that a change of one is noticed. Their paths may not exist: `item` says so.
        """
        return ()

    def reference(self, row: Row) -> str | None:
        """Return the correct answer to the row's prompt; None if there is no prompt."""
        return None


class PlainText(DataFormat):
    """Plain text; the loss is on every token but the first and on the end-of-sequence token, or on masked tokens."""

    api = 2
    name = "text"
    columns = ("text",)
    optional = ("weight",)
    tasks = (CAUSAL_LM, MASKED_LM)

    def item(self, row: Row, where: str) -> Text | Dropped:
        """See `DataFormat.item`."""
        text = string(row, "text", where)
        return weighted(Text(text, read_weight(row, where))) if text.strip() else Dropped("empty text")


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
            raise InputError(
                f"{where}: field 'label' must be text or a whole number, not {describe_type(row, 'label')}."
            )
        if not text.strip():
            return Dropped("empty text")
        if not str(label).strip():
            return Dropped("empty label")
        return weighted(Labelled(text, str(label).strip(), read_weight(row, where)))


def weighted(item: Any) -> Any:
    """Return an item, or a `Dropped` if its weight is 0."""
    return item if item.weight else Dropped("weight 0")


def all_dropped(path: Path | str, reasons: Mapping[Any, int]) -> str:
    """Return the message for a file all of whose rows were dropped, with the count of each reason."""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    total = sum(reasons.values())
    dropped = f"all of its {total:,} rows were" if total > 1 else "its only row was"
    return f"{path}: {dropped} dropped: {counts}."
