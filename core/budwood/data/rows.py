"""The rows of a data file, read from it on access, so that a file of any size needs little memory."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from budwood.data.files import find_files, hash_files, total_size
from budwood.errors import InputError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]
CHUNK, CHUNK_BYTES = 1024, 1 << 22
"""Maximum number of rows, and of their bytes in the file, that are encoded at once."""


class Rows(Sequence[Row]):
    """The rows of a data file, in order.

    Attributes:
        path: the file or folder, as the user gave it.
        columns: names, in order of first appearance.
        sha256: hex digest of the file's bytes (for a folder, of the names and bytes of its files).
        bytes: size of the file, or of the folder's.
        notes: lines to show to the user, such as a skipped byte order mark.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[Row],
        columns: Sequence[str],
        place: Callable[[int], str],
        notes: Sequence[str] = (),
    ) -> None:
        if not len(rows):
            raise InputError(f"{path}: no rows. Give a file with at least one.")
        self.path: Path | str = path
        self.columns, self.notes = list(columns), list(notes)
        self._rows, self._place = rows, place
        files = find_files(path)
        self.sha256, self.bytes = hash_files(files), total_size(files)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def is_repeat(self, index: int) -> bool:
        """Return whether the row repeats an earlier one."""
        return False

    def location(self, index: int) -> str:
        """Return the location of row `index` for messages: "train.jsonl:17", or "train.parquet:row 17"."""
        return f"{self.path}:{self._place(index)}"

    def size(self, index: int) -> int:
        """Return the approximate size of the row in the file in bytes; 0 if unknown."""
        size = getattr(self._rows, "size", None)
        return 0 if size is None else int(size(index))


def file_of(where: str) -> Path:
    """Return the file, or the folder of images, that a row's location names; paths in a row are relative to a file's.

    Args:
        where: see `Rows.location`.
    """
    return Path(where.rpartition(":")[0])


def chunks(rows: Rows) -> Iterator[range]:
    """Yield the row indices of each chunk that is encoded at once, in order."""
    start = size = 0
    for index in range(len(rows)):
        size += rows.size(index)
        if index + 1 - start == CHUNK or size >= CHUNK_BYTES or index + 1 == len(rows):
            yield range(start, index + 1)
            start, size = index + 1, 0


class Records(Sequence[Row]):
    """Records of a file, each read on access from the byte at which it starts.

    Args:
        path: the file.
        starts: the first byte of each record.
        numbers: the line of each record, from 1.
    """

    def __init__(self, path: Path, starts: Sequence[int], numbers: Sequence[int]) -> None:
        self.path = path
        self.starts, self.numbers = np.asarray(starts, dtype=np.int64), np.asarray(numbers, dtype=np.int64)
        self._end = path.stat().st_size
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(int(self.starts[index]))
        try:
            return self.parse(self._file)
        except (ValueError, StopIteration, InputError) as error:
            raise InputError(f"{self.path}: the file changed while it was read. Start again.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}

    def parse(self, file: IO[bytes]) -> Row:
        """Read the record at the file's position."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Return the line of a record, for messages."""
        return str(self.numbers[index])

    def size(self, index: int) -> int:
        """Return the number of bytes from the start of a record to the next one."""
        stop = self.starts[index + 1] if index + 1 < len(self.starts) else self._end
        return int(stop - self.starts[index])


class JsonLines(Records):
    """The objects of a JSON Lines file."""

    def parse(self, file: IO[bytes]) -> Row:
        """Parse the line; duplicate keys and constants were refused when the file was checked."""
        row: Row = json.loads(file.readline())
        return row


class CsvRecords(Records):
    """The records of a CSV file below its header.

    Args:
        header: names of the columns.
        delimiter: the field separator.
        missing: values that are read as empty fields.
    """

    def __init__(
        self, path: Path, starts: Sequence[int], numbers: Sequence[int], header: list[str], delimiter: str,
        missing: frozenset[str],
    ) -> None:  # fmt: skip
        super().__init__(path, starts, numbers)
        self._header, self._delimiter, self._missing = header, delimiter, missing

    def parse(self, file: IO[bytes]) -> Row:
        """Parse the record, which may span several lines."""
        texts = (line.decode() for line in csv_lines(file))
        values = next(csv.reader(texts, delimiter=self._delimiter, strict=True))
        pairs = zip(self._header, values, strict=True)
        return {name: "" if value in self._missing else value for name, value in pairs}


def csv_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file, which end with a line feed, a carriage return or both."""
    for line in file:
        if b"\r" in line[:-2]:
            yield from re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", line)
        else:
            yield line


class Batches(Sequence[Row]):
    """Rows that are cheaper to read in batches than one by one."""

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            index = range(len(self))[index]
            return self.batch(index, index + 1)[0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            return [self[i] for i in range(start, stop, step)]
        return self.batch(start, max(start, stop))

    def batch(self, start: int, stop: int) -> list[Row]:
        """Return the rows from `start` to before `stop`, both within the rows."""
        raise NotImplementedError


class Table(Batches):
    """Rows of an Arrow table, converted to Python values in batches on access."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.columns: list[str] = table.column_names
        self._names = _class_names(table.schema)

    def __len__(self) -> int:
        return self._table.num_rows

    def batch(self, start: int, stop: int) -> list[Row]:
        """Convert a slice of the table."""
        return list(_convert(self._table.slice(start, stop - start), self._names))

    def __iter__(self) -> Iterator[Row]:
        for batch in self._table.to_batches(max_chunksize=CHUNK):
            yield from _convert(batch, self._names)


class FolderRows(Table):
    """Rows of a `datasets` folder, which is mapped into memory."""

    def __init__(self, path: Path) -> None:
        import datasets

        super().__init__(datasets.load_from_disk(str(path)).with_format("arrow")[:])
        self._path = path

    def __reduce__(self) -> Any:
        return FolderRows, (self._path,)


class ParquetRows(Batches):
    """Rows of a Parquet file; one row group at a time is in memory.

    Raises:
        InputError: the file is unreadable; also on access.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._group, self._rows = -1, Table.__new__(Table)
        with self._errors():
            import pyarrow.parquet as pq

            self._file = pq.ParquetFile(path)
            counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
            self.columns: list[str] = self._file.schema_arrow.names
        self._stops = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __reduce__(self) -> Any:
        return ParquetRows, (self._path,)

    def batch(self, start: int, stop: int) -> list[Row]:
        """Read the rows from the row groups that hold them."""
        rows: list[Row] = []
        with self._errors():
            for group in range(len(self._stops) - 1):
                first, last = int(self._stops[group]), int(self._stops[group + 1])
                if max(first, start) < min(last, stop):
                    rows += self._rows_of(group)[max(first, start) - first : min(last, stop) - first]
        return rows

    def __iter__(self) -> Iterator[Row]:
        for group in range(len(self._stops) - 1):
            with self._errors():
                yield from self._rows_of(group)

    def _rows_of(self, group: int) -> Table:
        if group != self._group:
            del self._rows  # before the next one is read
            self._rows, self._group = Table(self._file.read_row_group(group)), group
        return self._rows

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # types defined by the file may raise any exception
            reason = first_line(error).rstrip(".")
            raise InputError(f"{self._path}: not a readable Parquet file: {reason}.") from error


def _convert(part: Any, names: Mapping[str, list[str]]) -> Iterator[Row]:
    for row in part.to_pylist():
        for column, classes in names.items():
            value = row[column]
            if isinstance(value, int) and 0 <= value < len(classes):
                row[column] = classes[value]
        yield row


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the class names of integer columns, which `datasets` stores in the schema's metadata (ClassLabel)."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if name in schema.names and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
