"""Data sources: what a recipe names as data, and the rows of several of them, mixed by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from budwood.data.bad_rows import BadRows
from budwood.data.files import find_files, hash_files, is_datasets_folder, is_image, total_size
from budwood.data.images import read_images
from budwood.data.reading import read_file, read_folder
from budwood.data.rows import Row, Rows
from budwood.errors import InputError, plural, unreadable


class Source(BaseModel):
    """One source of rows, and how often they are seen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str = Field(min_length=1, description="a file, a folder, a pattern such as data/*.jsonl, or a hub name")
    split: str | None = Field(None, min_length=1, description="only files of this split of a folder or hub name")
    config: str | None = Field(None, min_length=1, description="only this folder of a folder or hub name")
    revision: str | None = Field(None, min_length=1, max_length=255, description="branch, tag or commit of a hub name")
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="how often each row occurs in an epoch (2: twice; 0.25: a fixed quarter of the rows)",
    )


@dataclass(frozen=True)
class Located:
    """Data with the files of each source: those of a pattern or a hub name may be others a moment later."""

    data: str | Path | Sequence[Source]
    files: Sequence[Sequence[Path]]

    def __str__(self) -> str:
        return str(self.data)


Data = str | Path | Sequence[Source] | Located
"""What a recipe names as data, a path or sources; or that with its files."""


class JoinedRows(Rows):
    """The rows of several files one after another; those of a weighted source as often as its weight says."""

    def __init__(self, path: Path | str, parts: Sequence[Rows], order: np.ndarray, sha256: str) -> None:
        self.parts, self._order = parts, order
        self._starts = np.cumsum([0, *map(len, parts)])
        seen, first = np.unique(order, return_index=True)
        self._first = np.zeros(len(order), dtype=bool)
        self._first[first] = True
        self.path, self.sha256 = path, sha256
        self.bytes = sum(part.bytes for part in parts)
        self.columns = list(dict.fromkeys(column for part in parts for column in part.columns))
        self.notes = [note for part in parts for note in part.notes]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self._find(range(len(self))[index])
        return part[row]

    def __iter__(self) -> Iterator[Row]:
        if len(self) == self._starts[-1] and self._first.all():  # in order, so that tables are read in batches
            for part in self.parts:
                yield from part
        else:
            yield from (self[i] for i in range(len(self)))

    def size(self, index: int) -> int:
        """Return about how many bytes of its file the row takes; 0 if that is not known."""
        part, row = self._find(index)
        return part.size(row)

    def location(self, index: int) -> str:
        """Return the location of row `index` in its own file."""
        part, row = self._find(index)
        return part.location(row)

    def is_repeat(self, index: int) -> bool:
        """Return whether the row is there again because of its source's weight."""
        return not self._first[index]

    def _find(self, index: int) -> tuple[Rows, int]:
        place = int(self._order[index])
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.parts[part], place - int(self._starts[part])


def label(data: Data) -> Path | str:
    """Return the name of data in messages."""
    data = data.data if isinstance(data, Located) else data
    return Path(data) if isinstance(data, str | Path) else ", ".join(source.path for source in data)


def locate(data: Data) -> Located:
    """Look up the files of data, unless it has them; see `find_files`."""
    if isinstance(data, Located):
        return data
    return Located(data, [find_files(s.path, s.split, s.revision, s.config) for s in _sources(data)])


def data_size(data: Data) -> int:
    """Return the size of all files of the data in bytes."""
    return sum(map(total_size, locate(data).files))


def hash_data(data: Data) -> str:
    """Return a hex digest of the data: of its files, or of every source's files and weight.

    Raises:
        InputError: see `find_files`, or a file cannot be read.
    """
    found = locate(data)
    digests = [hash_files(files) for files in found.files]
    if isinstance(found.data, str | Path):
        return digests[0]
    parts = (f"{digest} {source.weight:g}" for digest, source in zip(digests, found.data, strict=True))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_rows(data: Data, bad: BadRows | None = None) -> Rows:
    """Read the rows of data.

    Args:
        data: a file, folder, pattern or hub name; or sources, whose rows are mixed by weight.
        bad: what to do with lines that are not rows; by default the first one is refused.

    Raises:
        InputError: a file is missing, unreadable, empty, of an unknown type, not UTF-8, or malformed; the message
            has its path and line.
    """
    found, bad = locate(data), bad or BadRows()
    sources = _sources(found.data)
    parts: list[Rows] = []
    counts: list[int] = []
    for source, files in zip(sources, found.files, strict=True):
        try:
            if is_datasets_folder(files[0].parent):
                new = [read_folder(files[0].parent)]
            elif is_image(files[0]):
                new = [read_images(_image_folder(source), files)]
            else:
                new = [read_file(file, bad) for file in files]
        except OSError as error:
            raise unreadable(source.path, error) from error
        parts += new
        counts.append(sum(map(len, new)))
    if len(parts) == 1 and sources[0].weight == 1:
        return parts[0]
    orders = [_times(source, count) for source, count in zip(sources, counts, strict=True)]
    starts = np.cumsum([0, *counts])
    order = np.concatenate([start + rows for start, rows in zip(starts, orders, strict=False)])
    joined = JoinedRows(label(data), parts, order, hash_data(found))
    if len(sources) > 1:
        shares = (
            f"{s.path} {plural(len(o), 'row')} ({len(o) / len(order):.1%})"
            for s, o in zip(sources, orders, strict=True)
        )
        joined.notes.append(f"mixed: {', '.join(shares)}")
    elif len(parts) > 1:
        joined.notes.append(plural(len(parts), "file"))
    return joined


def _sources(data: str | Path | Sequence[Source]) -> Sequence[Source]:
    return [Source(path=str(data))] if isinstance(data, str | Path) else data


def _image_folder(source: Source) -> Path:
    return Path(source.path) / (source.split or "")


def _times(source: Source, count: int) -> np.ndarray:
    """Return the rows of a source as often as its weight says; of a fraction, always the same ones."""
    whole, rest = int(source.weight), round((source.weight - int(source.weight)) * count)
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:rest])
    rows = np.concatenate([*[np.arange(count)] * whole, chosen]).astype(np.int64)
    if not len(rows):
        raise InputError(f"{source.path}: weight {source.weight:g} leaves none of its {count:,} rows: raise it.")
    return rows
