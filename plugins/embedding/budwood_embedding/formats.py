"""Data formats of embeddings: a text, one that belongs to it, and others that do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from budwood import DataFormat, Dropped, InputError

NAME = "embedding"
HARD = "negative"


@dataclass(frozen=True)
class Texts:
    """An anchor, the text that belongs to it, and hard negatives, which do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
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
        weight = row.get("weight", 1.0)
        weight = 1.0 if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise InputError(f"{where}: field 'weight' must be a number of at least 0, not {weight!r}.")
        return Texts(anchor, positive, negatives, float(weight)) if weight else Dropped("weight 0")


class QueryDocument(AnchorPositive):
    """A query and a document that answers it; optionally hard negatives: a document, or a list of documents."""

    api = 2
    name = "query-document"
    columns = ("query", "document")


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{where}: field '{name}' must be text, not {kind}.")
    if not value.strip():
        raise InputError(f"{where}: field '{name}' is empty. Give a text, or remove the row.")
    return value
