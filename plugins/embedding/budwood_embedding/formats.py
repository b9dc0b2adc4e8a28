"""Data formats of embeddings: a text, one that belongs to it, and others that do not; or two texts and a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from budwood import DataFormat, Dropped, InputError

NAME = "embedding"
HARD = "negative"
GRADED = "pairs with scores"
"""Kind of data."""


@dataclass(frozen=True)
class Texts:
    """An anchor, the text that belongs to it, and hard negatives, which do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Graded:
    """Two texts, and how similar they are: a higher score is more similar, on any scale."""

    texts: tuple[str, str]
    score: float
    weight: float = 1.0


class AnchorPositive(DataFormat):
    """An anchor and a text that belongs to it; optionally hard negatives: a text, or a list of texts."""

    api = 2
    name = "anchor-positive"
    columns: ClassVar[tuple[str, ...]] = ("anchor", "positive")
    optional = (HARD, "weight")
    tasks = (NAME,)

    def item(self, row: Mapping[str, Any], where: str) -> Texts | Dropped:
        """See `DataFormat.item`."""
        anchor, positive = (_text(row.get(name), name, where) for name in self.columns)
        hard = row.get(HARD)
        negatives = tuple(
            _text(text, HARD, where) for text in (hard if isinstance(hard, list) else [hard] if hard else [])
        )
        if positive in negatives:
            raise InputError(f"{where}: '{self.columns[1]}' and '{HARD}' are equal. Remove the row.")
        weight = _number(row, "weight", where, 1.0, least=0.0)
        return Texts(anchor, positive, negatives, weight) if weight else Dropped("weight 0")


class QueryDocument(AnchorPositive):
    """A query and a document that answers it; optionally hard negatives: a document, or a list of documents."""

    api = 2
    name = "query-document"
    columns = ("query", "document")


class SentencePair(DataFormat):
    """Two texts and a score of their similarity, as in the STS benchmark."""

    api = 2
    name = "sentence-pair"
    columns = ("sentence1", "sentence2", "score")
    optional = ("weight",)
    holds = GRADED
    tasks = (NAME,)

    def item(self, row: Mapping[str, Any], where: str) -> Graded | Dropped:
        """See `DataFormat.item`."""
        first, second = (_text(row.get(name), name, where) for name in self.columns[:2])
        score = _number(row, "score", where)
        weight = _number(row, "weight", where, 1.0, least=0.0)
        return Graded((first, second), score, weight) if weight else Dropped("weight 0")


def _number(row: Mapping[str, Any], name: str, where: str, default: float | None = None, least: float = -1e30) -> float:
    value = row.get(name)
    value = default if value is None else value
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not known or value < least:
        kind = f"a number of at least {least:g}" if least == 0 else "a finite number"
        raise InputError(f"{where}: field '{name}' must be {kind}, not {value!r}.")
    return float(value)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{where}: field '{name}' must be text, not {kind}.")
    if not value.strip():
        raise InputError(f"{where}: field '{name}' is empty. Give a text, or remove the row.")
    return value
