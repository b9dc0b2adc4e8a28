"""Several data formats in one list of sources: each file's rows are read in that file's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from budwood.contract.calls import attribute_errors
from budwood.data.formats import DataFormat


class Mixed(DataFormat):
    """The formats of several files; a row's location says which file it is from.

    Attributes:
        formats: the format of each file, by its path.
    """

    api = 2

    def __init__(self, formats: Mapping[str, DataFormat]) -> None:
        self.formats = dict(formats)
        files: dict[str, list[str]] = {}
        for path, each in self.formats.items():
            files.setdefault(" + ".join(each.columns), []).append(path)
        names = dict.fromkeys(each.name for each in self.formats.values())
        self.name = " and ".join(names)  # type: ignore[misc]
        self.columns = (", ".join(f"{columns} ({_some(paths)})" for columns, paths in files.items()),)  # type: ignore[misc]
        first = next(iter(self.formats.values()))
        self.tasks, self.holds, self.instead = first.tasks, first.holds, first.instead  # type: ignore[misc]

    def at(self, where: str) -> DataFormat:
        """Return the format of the file that a location is in."""
        return self.formats[where.rpartition(":")[0]]

    def item(self, row: Mapping[str, Any], where: str) -> Any:
        """See `DataFormat.item`."""
        each = self.at(where)
        with attribute_errors(each, "item"):
            return each.item(row, where)

    def reference(self, row: Mapping[str, Any]) -> str | None:
        """See `DataFormat.reference`."""
        found = (each for each in self.formats.values() if all(row.get(name) is not None for name in each.columns))
        each = next(found, None)
        return None if each is None else each.reference(row)


def _some(paths: Sequence[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
