"""Data formats of the text tasks: tags of words, spans of characters, and scores."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from budwood import DataFormat, Dropped, InputError, plural

TAGGING, REGRESSION = "token-classification", "sequence-regression"
WORD = re.compile(r"\w+|[^\w\s]")
"""A word, or a mark: what a span of characters consists of."""


@dataclass(frozen=True)
class Tagged:
    """A text, the characters of its words, and a tag for each word."""

    text: str
    words: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Scored:
    """A text and a number."""

    text: str
    score: float
    weight: float = 1.0


class TokenTags(DataFormat):
    """Words and a tag for each, such as B-PER, I-PER and O; the text is the words with spaces between them."""

    api = 2
    name = "token-tags"
    columns: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    optional = ("weight",)
    tasks = (TAGGING,)

    def item(self, row: Mapping[str, Any], where: str) -> Tagged | Dropped:
        """See `DataFormat.item`."""
        words, tags = (_list(row, name, where) for name in self.columns)
        if len(words) != len(tags):
            raise InputError(
                f"{where}: {plural(len(words), 'token')} but {plural(len(tags), 'tag')}: give a tag for each token."
            )
        for number, (word, tag) in enumerate(zip(words, tags, strict=True), 1):
            if not isinstance(word, str) or not word.strip():
                raise InputError(f"{where}: token {number} must be text that is not empty, not {word!r}.")
            if isinstance(tag, bool) or not isinstance(tag, str | int) or not str(tag).strip():
                raise InputError(f"{where}: tag {number} must be a name or a whole number, not {tag!r}.")
        if not words:
            return Dropped("no tokens")
        weight = _weight(row, where)
        starts = [sum(len(word) + 1 for word in words[:number]) for number in range(len(words))]
        bounds = tuple((start, start + len(word)) for start, word in zip(starts, words, strict=True))
        item = Tagged(" ".join(words), bounds, tuple(str(tag).strip() for tag in tags), weight)
        return item if weight else Dropped("weight 0")


class TextSpans(DataFormat):
    """A text and labelled spans of its characters: a list of objects with start, end (exclusive) and label."""

    api = 2
    name = "text-spans"
    columns = ("text", "spans")
    metadata = ("spans",)
    optional = ("weight",)
    tasks = (TAGGING,)

    def item(self, row: Mapping[str, Any], where: str) -> Tagged | Dropped:
        """See `DataFormat.item`. Spans become tags of words: B- for the first word of a span, I- for the others."""
        text, weight = _text(row, where), _weight(row, where)
        words = tuple(match.span() for match in WORD.finditer(text))
        starts, ends = ({start: i for i, (start, _) in enumerate(words)}, {end: i for i, (_, end) in enumerate(words)})
        tags = ["O"] * len(words)
        for number, span in enumerate(_list(row, "spans", where), 1):
            start, end, label = _span(span, number, len(text), where)
            if start not in starts or end not in ends:
                raise InputError(
                    f"{where}: span {number}, {text[start:end]!r}, begins or ends inside a word or at a space: "
                    "let it cover whole words."
                )
            inside = range(starts[start], ends[end] + 1)
            if any(tags[index] != "O" for index in inside):
                raise InputError(f"{where}: span {number}, {text[start:end]!r}, overlaps another. Remove one of them.")
            for index in inside:
                tags[index] = f"{'B' if index == inside[0] else 'I'}-{label}"
        if not words:
            return Dropped("empty text")
        return Tagged(text, words, tuple(tags), weight) if weight else Dropped("weight 0")


class TextScore(DataFormat):
    """A text and a number."""

    api = 2
    name = "text-score"
    columns = ("text", "score")
    metadata = ("score",)
    optional = ("weight",)
    tasks = (REGRESSION,)

    def item(self, row: Mapping[str, Any], where: str) -> Scored | Dropped:
        """See `DataFormat.item`."""
        text, score = _text(row, where), row.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise InputError(f"{where}: field 'score' must be a finite number, not {score!r}.")
        weight = _weight(row, where)
        if not text.strip():
            return Dropped("empty text")
        return Scored(text, float(score), weight) if weight else Dropped("weight 0")


def _text(row: Mapping[str, Any], where: str) -> str:
    if not isinstance(row.get("text"), str):
        raise InputError(f"{where}: field 'text' must be text, not {row.get('text')!r}.")
    return str(row["text"])


def _list(row: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise InputError(
            f"{where}: field '{name}' must be a list, not {'null' if value is None else type(value).__name__}."
        )
    return value


def _weight(row: Mapping[str, Any], where: str) -> float:
    weight = row.get("weight", 1.0)
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise InputError(f"{where}: field 'weight' must be a number of at least 0, not {weight!r}.")
    return float(weight)


def _span(span: Any, number: int, length: int, where: str) -> tuple[int, int, str]:
    """Return start, end and label of a span, given as an object or as a list of the three."""
    values = [span.get(key) for key in ("start", "end", "label")] if isinstance(span, Mapping) else span
    if not isinstance(values, list) or len(values) != 3:
        raise InputError(f"{where}: span {number} must have start, end and label, not {span!r}.")
    start, end, label = values
    if not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (start, end)):
        raise InputError(f"{where}: span {number}: start and end must be whole numbers, not {start!r} and {end!r}.")
    if not 0 <= start < end <= length:
        raise InputError(f"{where}: span {number}, {start}–{end}, is not inside the text of {length} characters.")
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"{where}: span {number}: label must be a name, not {label!r}.")
    return start, end, label.strip()
