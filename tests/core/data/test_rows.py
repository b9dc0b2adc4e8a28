"""Rows are read from their file on access, and are the same in any order and in another process."""

from __future__ import annotations

import csv
import io
import json
import random
import tracemalloc
from multiprocessing import Pipe
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from budwood.data.rows import CHUNK, Rows, chunks
from budwood.data.sources import read_rows
from budwood.errors import InputError

ROWS = [
    {"text": f"row {i}, {'x' * (i % 7)}", "note": ["", 'a "quoted" word', "two\nlines", "é, ü\r\nand more"][i % 4]}
    for i in range(300)
]


def sent(rows: Rows) -> Rows:
    """Return what another process would receive."""
    ours, theirs = Pipe()
    ours.send(rows)
    received: Rows = theirs.recv()
    return received


def write_file(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n\n" * (i % 5 == 0) for i, row in enumerate(ROWS)]
        path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["text", "note"], lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(ROWS)
        path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=37)
    else:
        path = folder / "data"
        Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_rows_are_the_same_in_any_order_and_in_another_process(tmp_path: Path, kind: str) -> None:
    rows = read_rows(write_file(tmp_path, kind))
    for read in (rows, sent(rows)):
        assert list(read) == ROWS
        order = list(range(len(ROWS)))
        random.Random(0).shuffle(order)
        assert [read[i] for i in order] == [ROWS[i] for i in order]
        assert read[30:80] == ROWS[30:80]
        assert read[250:20:-3] == ROWS[250:20:-3]
        assert read[-1] == ROWS[-1]
        assert [read.location(i) for i in (0, 7, 299)] == [rows.location(i) for i in (0, 7, 299)]
        with pytest.raises(IndexError):
            read[300]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_ending_of_csv(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(end.join([b"a,b", b"1,2", b'"x' + end + b'y",3', b"", b"4,5"]))
    rows = read_rows(path)
    assert list(rows) == [{"a": "1", "b": "2"}, {"a": "x" + end.decode() + "y", "b": "3"}, {"a": "4", "b": "5"}]
    assert [rows.location(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 3, 6)]


def test_reading_takes_memory_for_a_line_and_not_for_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(4000):
            file.write(json.dumps({"text": f"{i} " + "x" * 5000}) + "\n")
    tracemalloc.start()
    rows = read_rows(path)
    assert sum(len(row["text"]) for row in rows) > 20_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"a": "x"}\n{"a": "y"}\n' if name == "a.jsonl" else "a,b\n1,2\n3,4\n")
    rows = read_rows(path)
    path.write_text("z\n")
    with pytest.raises(InputError, match=r"a\.\w+: the file changed while it was read. Start again"):
        rows[1]


def test_chunks_end_after_a_number_of_rows_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x"}) + "\n" for _ in range(CHUNK + 3)))
    assert list(chunks(read_rows(path))) == [range(CHUNK), range(CHUNK, CHUNK + 3)]
    path.write_text("".join(json.dumps({"text": "x" * 1_500_000}) + "\n" for _ in range(7)))
    assert [len(chunk) for chunk in chunks(read_rows(path))] == [3, 3, 1]
