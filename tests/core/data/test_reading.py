"""Files are read as rows; errors are reported with file and line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from budwood.data.sources import read_rows
from budwood.errors import InputError, ResourceError

ROWS = [{"text": "héllo", "label": "a"}, {"text": "two\nlines", "label": "b"}]
GOOD = {
    "a.jsonl": '{"text": "héllo", "label": "a"}\n\n{"text": "two\\nlines", "label": "b"}\n',
    "a.ndjson": '{"text": "héllo", "label": "a"}\r\n{"text": "two\\nlines", "label": "b"}',
    "a.json": json.dumps(ROWS),
    "lines.json": '{"text": "héllo", "label": "a"}\n{"text": "two\\nlines", "label": "b"}\n',
    "a.csv": 'text,label\r\nhéllo,a\r\n"two\nlines",b\r\n',
    "a.tsv": 'text\tlabel\nhéllo\ta\n"two\nlines"\tb\n',
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
@pytest.mark.parametrize("name", GOOD)
def test_text_files(tmp_path: Path, name: str, mark: str) -> None:
    path = tmp_path / name
    path.write_bytes((mark + GOOD[name]).encode())
    rows = read_rows(path)
    assert list(rows) == ROWS
    assert rows.columns == ["text", "label"]
    assert any("byte order mark" in note for note in rows.notes) == bool(mark)


def test_locations_are_the_lines_where_rows_begin(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [read_rows(lines).location(i) for i in (0, 1)] == [f"{lines}:2", f"{lines}:4"]
    table = tmp_path / "a.csv"
    table.write_text('a,b\n"one\ntwo",x\n\nthree,y\n')
    assert [read_rows(table).location(i) for i in (0, 1)] == [f"{table}:2", f"{table}:5"]
    listed = tmp_path / "a.json"
    listed.write_text('[{"a": 1}, {"a": 2}]')
    assert read_rows(listed).location(1) == f"{listed}:row 2"


def test_columns_are_the_union_over_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"b": 1}\n{"a": 1, "b": 2}\n')
    assert read_rows(path).columns == ["b", "a"]


def test_parquet_and_folders(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert list(rows) == ROWS
    assert rows[1] == ROWS[1]
    assert rows[-1] == ROWS[1]
    assert rows[0:2] == ROWS
    assert rows.location(1) == f"{tmp_path / 'a.parquet'}:row 2"
    folder = tmp_path / "shards"
    folder.mkdir()
    for part in range(2):
        pq.write_table(table, folder / f"train-{part:05}-of-00002.parquet")
    assert list(read_rows(folder)) == ROWS * 2
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="splits test, train"):
        read_rows(folder)


def test_datasets_folder(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    dataset = Dataset.from_list([{"text": "x", "label": 1}, {"text": "y", "label": 0}], features=features)
    dataset.select([1, 0]).save_to_disk(tmp_path / "one")
    rows = read_rows(tmp_path / "one")
    assert list(rows) == [{"text": "y", "label": "ham"}, {"text": "x", "label": "spam"}]
    assert rows.columns == ["text", "label"]
    dataset.to_parquet(tmp_path / "a.parquet")
    assert [row["label"] for row in read_rows(tmp_path / "a.parquet")] == ["spam", "ham"]
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match=r"splits test, train. Name one of them: .*both/train"):
        read_rows(tmp_path / "both")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="does not name files in the same folder"):
        read_rows(tmp_path / "one")


BAD = {
    "empty": ("a.jsonl", b"", "the file is empty"),
    "blank": ("a.jsonl", b"\n \n", ": no rows"),
    "header only": ("a.csv", b"text,label\n", ": no rows"),
    "empty list": ("a.json", b"[]", ": no rows"),
    "malformed": ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: malformed JSON at column"),
    "several lines": (
        "a.jsonl",
        b'{\n "a": 1\n}\n',
        r"a\.jsonl: the objects take several lines each. Wri",
    ),
    "trailing": ("a.jsonl", b'{"a": 1} x\n', r"a\.jsonl:1: malformed JSON at column 10"),
    "list in a line": ("a.jsonl", b"[1]\n", r"a\.jsonl:1: each line must be one JSON object, not a list"),
    "string in a line": ("a.jsonl", b'"x"\n', r"a\.jsonl:1: .* not a string"),
    "null in a line": ("a.jsonl", b"null\n", r"a\.jsonl:1: .* not null"),
    "twice": ("a.jsonl", b'{"a": 1, "a": 2}\n', r"a\.jsonl:1: .*duplicate key 'a'"),
    "NaN": ("a.jsonl", b'{"a": NaN}\n', r"a\.jsonl:1: .*NaN is not JSON"),
    "deep": ("a.jsonl", b'{"a": ' + b"[" * 200_000 + b"\n", r"a\.jsonl:1: .*nested too deeply"),
    "long number": ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: malformed JSON"),
    "latin-1": ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8 .*iconv -f latin1"),
    "latin-1 csv": ("a.csv", b"a,b\nx,y\ncaf\xe9,z\n", r"a\.csv:3: not UTF-8 .*iconv -f latin1"),
    "latin-1 json": ("a.json", b'[{"a":\n"caf\xe9"}]', r"a\.json:2: not UTF-8"),
    "utf-16": (
        "a.jsonl",
        '{"a": 1}\n'.encode("utf-16"),
        r"in UTF-16. Convert it: iconv -f utf-16 -t utf-8 \S*/a\.jsonl > \S*/a-utf8\.jsonl",
    ),
    "utf-16 without a mark": (
        "a.jsonl",
        '{"a": 1}\n'.encode("utf-16le"),
        r"in UTF-16, without a byte order mark. Convert it: iconv -f utf-16le -t utf-8",
    ),
    "utf-16 csv": ("a.csv", "a,b\n1,2\n".encode("utf-16be"), r"without a byte order mark. .* -f utf-16be"),
    "utf-32": (
        "a b.jsonl",
        '{"a": 1}\n'.encode("utf-32"),
        r"iconv -f utf-32 -t utf-8 '\S*/a b\.jsonl' > '\S*/a b-utf8\.jsonl'",
    ),
    "binary": ("a.jsonl", b"\x00\x01\x02" * 50_000, r"a\.jsonl:1: binary data"),
    "binary csv": ("a.csv", b"a,b\n\x00\n", r"a\.csv:2: binary data"),
    "not a list": ("a.json", b"3", "must be a list of objects, not a number"),
    "not objects": ("a.json", b'[{"a": 1}, 2]', r"a\.json:row 2: must be an object, not a number"),
    "broken list": ("a.json", b'[{"a": 1},\n', r"a\.json: malformed JSON at line 2"),
    "short row": ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: 1 field, but the header has 2"),
    "long row": ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2: 3 fields"),
    "open quote": ("a.csv", b'a,b\n1,2\n"3,4\n', r"a\.csv:3: malformed CSV"),
    "header twice": ("a.csv", b"a,a\n1,2\n", "column 'a' appears twice"),
    "semicolons": ("a.csv", b"text;label\nx;y\n", r"a\.csv:1: .*semicolons"),
    "not parquet": ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
    "compressed": ("a.jsonl.gz", b"\x1f\x8b", "compressed"),
    "unknown": ("a.xlsx", b"PK", r"unknown file type '\.xlsx'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    name, data, message = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code == 2


def test_missing_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="no such file. Did you mean 'train.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "no" / "such.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a `datasets` folder"):
        read_rows(tmp_path / "empty")
    with pytest.raises(InputError, match="not a regular file"):
        read_rows("/dev/null")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match="cannot be read: Permission denied"):
        read_rows(tmp_path / "train.jsonl")


def test_a_line_of_several_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 5_000_000}) + "\n")
    assert len(read_rows(path)[0]["text"]) == 5_000_000
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 1_000_000 + "\n")
    assert len(read_rows(path)[0]["text"]) == 1_000_000


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (first, second):
        path.write_text('{"a": 1}\n')
    assert read_rows(first).sha256 == read_rows(second).sha256
    second.write_text('{"a": 2}\n')
    assert read_rows(first).sha256 != read_rows(second).sha256


def test_jsonl_imports_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    code = (
        "import sys; from budwood.data.sources import read_rows; read_rows(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
