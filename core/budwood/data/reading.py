"""Reads data files as rows: JSONL, JSON, CSV, Parquet, `datasets` folders. Every error names file and line."""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

from budwood.data.bad_rows import BadRows
from budwood.data.files import ACCEPTED, SPLITS
from budwood.data.rows import CsvRecords, FolderRows, JsonLines, ParquetRows, Rows, csv_lines
from budwood.errors import InputError, first_line, plural

MISSING = frozenset(("NaN", "nan", "NAN", "NULL", "null", "<NA>", "#N/A", "\\N"))
"""What pandas, R, spreadsheets and databases write into a CSV field without a value; "NA" and "None" may be words."""
HOLDERS = ("data", "rows", "examples", "instances", *SPLITS)
"""Keys under which an object may hold the rows of a file."""
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


def read_file(path: Path, bad: BadRows) -> Rows:
    """Read a data file.

    Raises:
        InputError: it is not UTF-8, malformed or empty; the message has its path and line.
        OSError: it cannot be read.
    """
    return _READERS[path.suffix.lower()](path, bad)


def _read_jsonl(path: Path, bad: BadRows) -> Rows:
    starts, numbers, notes = array("q"), array("q"), list[str]()
    columns: dict[str, None] = {}
    with path.open("rb") as file:
        at = 0
        for number, line in enumerate(file, 1):
            raw = _strip_mark(path, line, notes) if number == 1 else line
            start, at = at + len(line) - len(raw), at + len(line)
            if not raw.strip():
                continue
            try:
                row = _parse_line(raw, path, number)
            except InputError as error:
                bad.meet(error, f"{path}:{number}", raw.decode(errors="replace").rstrip("\r\n"))
                continue
            columns.update(dict.fromkeys(row))
            starts.append(start)
            numbers.append(number)
    records = JsonLines(path, starts, numbers)
    return Rows(path, records, list(columns), records.place, notes)


def _parse_line(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    text = _decode(raw, path, number)
    if number == 1 and re.fullmatch(r"\s*\{(.*[^}\s],)?\s*", text):
        remedy = "Write each on one line, or a list [{…}, {…}] in a .json file."
        raise InputError(f"{path}: the objects take several lines each. {remedy}")
    row = _parse_json(text, f"{path}:{number}")
    if not isinstance(row, dict):
        hint = " (a list of objects belongs in a .json file)" if isinstance(row, list) else ""
        raise InputError(f"{path}:{number}: each line must be one JSON object, not {_kind(row)}{hint}.")
    return row


def _read_json(path: Path, bad: BadRows) -> Rows:
    notes: list[str] = []
    with path.open("rb") as file:
        head = _strip_mark(path, file.read(4096), []).lstrip()
    if head.startswith(b"{"):  # common: JSON Lines in a file named .json
        _check_object(path)
        rows = _read_jsonl(path, bad)
        rows.notes.append(f"{path}: read as JSON Lines, one object per line")
        return rows
    text = _decode_whole(path, notes)
    data = _parse_json(text, str(path), whole=True)
    if not isinstance(data, list):
        raise InputError(f"{path}: must be a list of objects, not {_kind(data)}.")
    columns: dict[str, None] = {}
    numbers: list[int] = []
    for number, row in enumerate(data, 1):
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
            numbers.append(number)
        else:
            where = f"{path}:row {number}"
            turns = isinstance(row, list) and bool(row) and all(isinstance(turn, dict) for turn in row)
            hint = ' (a conversation is written as {"messages": […]})' if turns else ""
            bad.meet(InputError(f"{where}: must be an object, not {_kind(row)}{hint}."), where, row)
    objects = [data[number - 1] for number in numbers]
    return Rows(path, objects, list(columns), partial(_place, numbers), notes)


def _place(numbers: Sequence[int], index: int) -> str:
    return f"row {numbers[index]}"


def _check_object(path: Path) -> None:
    """Refuse a file that is one object, unless that is a row by itself: an object on one line that holds no rows.

    Raises:
        InputError: it names the keys that hold lists of rows, as in files with {"data": […]} or {"train": […]}.
    """
    with path.open("rb") as file:
        filled = (line for line in file if line.strip())
        first, several = next(filled), next(filled, None) is not None
    try:
        if several and isinstance(json.loads(_strip_mark(path, first, [])), dict):  # JSON Lines
            return
    except (ValueError, RecursionError):
        pass
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # JSON Lines, or malformed
        return
    if not isinstance(whole, dict):
        return
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if several or any(key in HOLDERS for key in lists):
        held = f"; its key {' and '.join(map(repr, lists[:3]))} holds one: save that list alone"
        hint = held if lists else ": write [{…}]"
        raise InputError(f"{path}: must hold a list of objects, not one object{hint}.")


class _Lines(Iterator[str]):
    """The lines of a CSV file, and how far it was read.

    Attributes:
        at: number of bytes read.
        number: number of lines read.
    """

    def __init__(self, path: Path, file: IO[bytes], notes: list[str]) -> None:
        self._path, self._notes = path, notes
        self._lines = csv_lines(file)
        self.at = self.number = 0

    def __next__(self) -> str:
        line = next(self._lines)
        self.at += len(line)
        self.number += 1
        return _decode(
            _strip_mark(self._path, line, self._notes) if self.number == 1 else line, self._path, self.number
        )


def _read_csv(path: Path, bad: BadRows) -> Rows:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields beyond 128 KiB
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    starts, numbers, notes = array("q"), array("q"), list[str]()
    missing: Counter[str] = Counter()
    header: list[str] | None = None
    with path.open("rb") as file:
        lines = _Lines(path, file, notes)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        at, number = 0, 1
        try:
            for values in reader:
                start, line = at, number
                at, number = lines.at, lines.number + 1
                if not values:  # a blank line
                    continue
                if header is None:
                    header = _check_header(path, values)
                    continue
                if len(values) != len(header):
                    error = InputError(
                        f"{path}:{line}: {plural(len(values), 'field')}, but the header has {len(header)}."
                    )
                    bad.meet(error, f"{path}:{line}", values)
                    continue
                missing.update(value for value in values if value in MISSING)
                starts.append(start)
                numbers.append(line)
        except csv.Error as error:
            raise InputError(f"{path}:{number}: malformed CSV: {error}.") from error
    if missing:
        counts = ", ".join(f"{count:,} {value}" for value, count in missing.most_common())
        notes.append(f"read as empty fields, since they mean a missing value: {counts} (as text, give them in JSONL)")
    records = CsvRecords(path, starts, numbers, header or [], delimiter, MISSING)
    return Rows(path, records, header or [], records.place, notes)


def _check_header(path: Path, names: list[str]) -> list[str]:
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) == 1 and separator in names[0]:
            raise InputError(f"{path}:1: the columns are separated by {name}. Save the file with commas.")
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(f"{path}:1: column '{name}' appears twice in the header.")
    return names


def read_folder(path: Path) -> Rows:
    """Read a `datasets` folder.

    Raises:
        InputError: it is malformed, or refers to files elsewhere.
        OSError: it cannot be read.
    """
    _check_names(path)
    try:
        rows = FolderRows(path)
    except Exception as error:  # the library may raise any exception on bad files
        raise InputError(f"{path}: not a readable `datasets` folder: {first_line(error).rstrip('.')}.") from error
    return _arrow_rows(path, rows)


def _check_names(path: Path) -> None:
    """Refuse a `datasets` folder whose list of files points elsewhere."""
    state = _parse_json(_decode_whole(path / "state.json", []), str(path / "state.json"), whole=True)
    files = state.get("_data_files") if isinstance(state, dict) else None
    names = [file.get("filename") if isinstance(file, dict) else None for file in files or ()]
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise InputError(f"{path / 'state.json'}: '_data_files' does not name files in the same folder.")


def _read_parquet(path: Path, bad: BadRows) -> Rows:
    return _arrow_rows(path, ParquetRows(path))


def _arrow_rows(path: Path, rows: FolderRows | ParquetRows) -> Rows:
    for name in rows.columns:
        if rows.columns.count(name) > 1:
            raise InputError(f"{path}: column '{name}' appears twice.")
    return Rows(path, rows, rows.columns, partial(_place, range(1, len(rows) + 1)))


def _parse_json(text: str, where: str, whole: bool = False) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if whole else f"column {error.colno}"
        raise InputError(f"{where}: malformed JSON at {place}: {error.msg}.") from error
    except RecursionError as error:
        raise InputError(f"{where}: malformed JSON: nested too deeply.") from error
    except ValueError as error:  # raised by the hooks below, and for numbers with thousands of digits
        raise InputError(f"{where}: malformed JSON: {first_line(error).rstrip('.')}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key '{duplicate}' in an object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; use null or leave the field out")


def _strip_mark(path: Path, data: bytes, notes: list[str]) -> bytes:
    """Skip a UTF-8 byte order mark; refuse other encodings' marks."""
    if data.startswith(_WIDE_MARKS):
        wide = "utf-32" if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "utf-16"
        raise InputError(f"{path}: encoded in {wide.upper()}. {_convert(path, wide)}")
    if data.startswith(codecs.BOM_UTF8):
        notes.append(f"{path}: skipped a byte order mark at the start")
        return data[len(codecs.BOM_UTF8) :]
    return data


def _convert(path: Path, encoding: str) -> str:
    """Return the command that converts a file to UTF-8, as the shell takes it."""
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"Convert it: iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"


def _decode(raw: bytes, path: Path, line: int) -> str:
    if b"\0" in raw:
        for encoding, zeros, letters in (("utf-16le", raw[1::2], raw[::2]), ("utf-16be", raw[::2], raw[1::2])):
            if line == 1 and len(letters) > 1 and 2 * zeros.count(0) > len(zeros) and 0 not in letters:
                text = f"{path}: encoded in UTF-16, without a byte order mark."
                raise InputError(f"{text} {_convert(path, encoding)}")
        raise InputError(f"{path}:{line}: binary data, not text. Accepted: {ACCEPTED}.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}; Latin-1 or Windows-1252?). "
            + _convert(path, "latin1")
        ) from error


def _decode_whole(path: Path, notes: list[str]) -> str:
    data = _strip_mark(path, path.read_bytes(), notes)
    if b"\0" not in data:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            pass
    for number, raw in enumerate(data.split(b"\n"), 1):  # decode line by line to find the bad one
        _decode(raw, path, number)
    raise AssertionError("every line decodes, so the whole file must")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


_READERS: dict[str, Callable[[Path, BadRows], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
