"""Untrusted JSON and safetensors headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from budwood import CorruptError, ResourceError
from budwood.untrusted import formats as files


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b" " * (files.MAX_JSON + 1),
        b"",
    ],
)
def test_invalid_json_is_corrupt(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"x\.json"):
        files.read_json(path)


def test_a_pipe_instead_of_json_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CorruptError):
        files.read_json(tmp_path / "x.json")
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CorruptError):
        files.read_header(tmp_path / "x.safetensors")


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_header_is_read_as_dtypes_and_shapes(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros(0, 5),
        "d": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = files.read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in infos.items()} == {k: tuple(v.shape) for k, v in tensors.items()}
    assert (infos["b"].dtype, infos["b"].bytes) == ("BF16", 8)
    for name, tensor in tensors.items():
        with infos[name].file.open("rb") as file:
            file.seek(infos[name].start)
            assert file.read(infos[name].bytes) == tensor.flatten().view(torch.uint8).numpy().tobytes()


def entry(begin: int, end: int, shape=(1,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        ({"a": entry(0, 4)}, b"123", "truncated"),
        ({"a": entry(0, 4)}, b"12345", "padded"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, "gap"),
        ({"a": entry(0, 4, shape=(2,))}, b"1234", "wrong size for its shape"),
        ({"a": entry(0, 4, shape=(10**9, 10**9))}, b"1234", "wrong size for its shape"),
        ({"a": entry(0, 4, shape=(1 << 41,))}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, shape=(-1, -1))}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, shape=(1.0,))}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, dtype="PICKLE")}, b"1234", "dtype"),
        ({"a": entry(-4, 0)}, b"1234", "offsets"),
        ({"a": {"dtype": "F32"}}, b"1234", "offsets"),
        ({"a": entry(0, 4) | {"data_offsets": [0, 4.0]}}, b"1234", "offsets"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, b"1234", "offsets"),
        ({"a": entry(4, 0)}, b"1234", "overlaps"),
        ({"a": entry(0, 4, shape=(True, 1))}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, shape=(1,) * 9)}, b"1234", "impossible shape"),
        ({"a": entry(0, 4) | {"shape": 1}}, b"1234", "impossible shape"),
        ({"a": entry(0, 4) | {"dtype": ["F32"]}}, b"1234", "dtype"),
        ({"a": entry(0, 1, shape=(1,), dtype="F4")}, b"1", "wrong size for its shape"),
        ({"a": entry(0, 4), "__metadata__": {"a": 1}}, b"1234", "metadata"),
        ({"a": entry(0, 4), "__metadata__": []}, b"1234", "metadata"),
        ({"x" * 100_000: entry(0, 4, shape=(2,))}, b"1234", "xxx…"),
        (b'{"a": 1, "a": 1}', b"", "duplicate key"),
        (b'{"\xff": 1}', b"", "JSON"),
        (b"", b"", "JSON"),
        (b"null", b"", "object"),
        ({"a": 1}, b"1234", "offsets"),
        (b"{" * 50_000, b"", "deep|JSON"),
        (b"[]", b"", "object"),
    ],
)
def test_inconsistent_headers_are_corrupt(tmp_path, header, data, what):
    with pytest.raises(CorruptError, match=what) as error:
        files.read_header(raw(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_header_of_100_mb_is_refused_without_reading_it(tmp_path):
    claimed = tmp_path / "claimed.safetensors"
    claimed.write_bytes((100 << 20).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptError, match="104,857,600"):
        files.read_header(claimed)
    real = tmp_path / "real.safetensors"
    with real.open("wb") as file:
        file.write((100 << 20).to_bytes(8, "little"))
        file.truncate(8 + (100 << 20))
    with pytest.raises(CorruptError, match="the limit is"):
        files.read_header(real)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])
def test_a_pickle_with_a_safetensors_name_is_reported_as_a_pickle(tmp_path, start):
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + b"x" * 100)
    with pytest.raises(CorruptError, match="pickle"):
        files.read_header(path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle_is_not_a_pickle(tmp_path, length):
    tensors = {"weight": torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": ""})
    short = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "x" * (length - short)})
    assert (tmp_path / "a.safetensors").read_bytes()[:2] == bytes([0x80, length >> 8])
    assert list(files.read_header(tmp_path / "a.safetensors")) == ["weight"]


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 199), st.integers(0, 255))
def test_a_changed_header_byte_raises_only_corrupt_errors(tmp_path, place, value):
    good = tmp_path / "good.safetensors"
    if not good.exists():
        save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, good)
    data = bytearray(good.read_bytes())
    data[place % len(data)] = value
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    try:
        infos = files.read_header(bad)
    except CorruptError:
        return
    assert {k: tuple(v.shape) for k, v in load_file(bad).items()} == {k: v.shape for k, v in infos.items()}


@settings(max_examples=200, deadline=None, derandomize=True)
@example(b"")
@given(st.binary(max_size=200))
def test_random_bytes_raise_only_corrupt_errors(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        files.read_header(path)
    except CorruptError as error:
        assert "\n" not in str(error)


def test_truncated_and_extended_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(20, 30), "b": torch.zeros(4)}, path)
    whole = path.read_bytes()
    for keep in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CorruptError, match="truncated"):
            files.read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptError, match="padded"):
        files.read_header(path)


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CorruptError, match="git lfs pull"):
        files.read_header(path)


def test_an_unreadable_file_is_a_resource_error(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("{}")

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ResourceError, match=r"x\.json: cannot be read: Permission denied"):
        files.read_json(tmp_path / "x.json")


def test_the_most_expensive_header_is_refused_in_bounded_memory(tmp_path):
    """16 MiB of invalid tensor entries; the process has 1.5 GB in total."""
    item = b'"%07d":{},'
    header = b"{" + b"".join(item % i for i in range(files.MAX_HEADER // 14)) + b'"":{}}'
    path = raw(tmp_path / "x.safetensors", header[: files.MAX_HEADER])
    code = (
        "import resource, sys; from pathlib import Path; from budwood.untrusted.formats import read_header\n"
        "from budwood import CorruptError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, 1_500_000_000))\n"
        f"try: read_header(Path({str(path)!r}))\n"
        "except CorruptError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no valid offsets" in done.stdout, done.stderr
