"""The files that rows name, such as images by path: their content belongs to the data."""

from __future__ import annotations

import hashlib
from pathlib import Path

from budwood.contract.calls import attribute_errors
from budwood.data.bad_rows import BadRows
from budwood.data.formats import DataFormat
from budwood.data.mixed import Mixed
from budwood.data.recognition import installed_formats, recognise_rows
from budwood.data.sources import Data, read_rows
from budwood.errors import unreadable


def hash_files_of(data: Data, task: str) -> str:
    """Return a hex digest of the files that the rows of data name, in order; empty if no format of the task names any.

    Raises:
        InputError: see `read_rows` and `recognise_rows`.
        ResourceError: a file cannot be read.
    """
    formats, _ = installed_formats()
    if not any(task in each.tasks and type(each).files is not DataFormat.files for each in formats):
        return ""
    rows = read_rows(data, BadRows(skip=True))
    data_format = recognise_rows(rows, task)
    digest, seen = hashlib.sha256(), dict[Path, bytes]()
    for index, row in enumerate(rows):
        where = rows.location(index)
        each = data_format.at(where) if isinstance(data_format, Mixed) else data_format
        with attribute_errors(each, "files"):
            paths = each.files(row, where)
        for path in paths:
            if path not in seen:
                seen[path] = _hash(path)
            digest.update(seen[path])
    return digest.hexdigest() if seen else ""


def _hash(path: Path) -> bytes:
    """Return the digest of a file; of one that is not there, nothing: its row is refused by name."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise unreadable(path, error) from error
