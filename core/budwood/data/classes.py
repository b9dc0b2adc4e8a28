"""Class names, learned from the training data or fixed by it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from budwood.errors import InputError, did_you_mean


class Classes:
    """The classes of a file's labels. Indices are provisional while classes are being learned; see `order`."""

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.given = None if names is None else list(names)
        self._index = {name: index for index, name in enumerate(names or ())}
        self._order: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of classes known so far."""
        return len(self._index)

    @property
    def learned(self) -> list[str] | None:
        """Names by provisional index; None if the classes are fixed or no label was read."""
        return list(self._index) if self.given is None and self._index else None

    def index(self, name: str, where: str) -> int:
        """Index of a class, which is added if classes are being learned.

        Raises:
            InputError: the classes are fixed, and `name` is not one of them.
        """
        if name not in self._index:
            if self.given is not None:
                names = ", ".join(self.given[:10]) + (
                    f" and {len(self.given) - 10} more" if len(self.given) > 10 else ""
                )
                raise InputError(
                    f"{where}: label '{name}' is not in the training data.{did_you_mean(name, self.given)} "
                    f"Known: {names}."
                )
            self._index[name] = len(self._index)
        return self._index[name]

    def finish(self, path: str) -> list[str]:
        """All classes in their final order: integers by value, then names alphabetically. Empty if no label was read.

        Raises:
            InputError: the classes are learned from the file, and it has only one.
        """
        if self.given is not None or not self._index:
            return self.given or []
        names = sorted(self._index, key=_label_order)
        if len(names) < 2:
            raise InputError(f"{path}: every label is '{names[0]}'. Classification needs at least two classes.")
        self._order = np.empty(len(names), dtype=np.int64)
        self._order[[self._index[name] for name in names]] = np.arange(len(names))
        return names

    def order(self, labels: np.ndarray) -> np.ndarray:
        """Map provisional indices to final ones."""
        return labels if self._order is None else self._order[labels]


def near_equal(names: Sequence[str]) -> list[str]:
    """Return a note for each set of names that differ only in case, spaces, hyphens, underscores or forms of a letter.

    Also for whole numbers that are written in two ways, such as 1 and 1.0.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        key = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold()) or name
        groups.setdefault(re.sub(r"^(\d+)\.0+$", r"\1", key), []).append(name)
    return [
        f"nearly equal classes, trained as different ones: {', '.join(map(repr, group))}"
        for group in groups.values()
        if len(group) > 1
    ]


def _label_order(name: str) -> tuple[bool, int, str]:
    number = name.isascii() and name.isdigit()
    return (not number, int(name) if number else 0, name)
