"""Names, JSON, safetensors headers and atomic folders, all of which may be hostile or interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from budwood import CorruptError, InputError, ResourceError
from budwood.adapters import files


@pytest.mark.parametrize("name", ["a", "v1.2", "my-adapter_3", "lora_a", "x" * 64])
def test_names_that_are_taken(name):
    assert files.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/abs", "a/b", "a\\b", "-x", ".hidden", "a..b", "a.", "x" * 65, "x" * 300]
    + ["con", "NUL.txt", "lpt1", "a\nb", "a\0b", "a b", "ä", "a:b", "~", "*"],
)
def test_names_that_leave_a_root_or_break_a_system_are_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        files.check_name(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


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
def test_json_that_is_not_plain_is_corrupt(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"x\.json"):
        files.read_json(path)


def test_a_pipe_in_the_place_of_json_is_not_waited_for(tmp_path):
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


def test_header_gives_dtype_and_shape_of_every_tensor(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros(0, 5),
        "d": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = files.read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in infos.items()} == {k: tuple(v.shape) for k, v in tensors.items()}
    assert infos["b"] == files.TensorInfo("BF16", (4,), 8)


def entry(begin: int, end: int, shape=(1,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        ({"a": entry(0, 4)}, b"123", "truncated"),
        ({"a": entry(0, 4)}, b"12345", "padded"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, "gap"),
        ({"a": entry(0, 4, shape=(2,))}, b"1234", "bytes of its shape"),
        ({"a": entry(0, 4, shape=(10**9, 10**9))}, b"1234", "bytes of its shape"),
        ({"a": entry(0, 4, shape=(1 << 41,))}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, shape=(-1, -1))}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, shape=(1.0,))}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, dtype="PICKLE")}, b"1234", "dtype"),
        ({"a": entry(-4, 0)}, b"1234", "offsets"),
        ({"a": {"dtype": "F32"}}, b"1234", "offsets"),
        ({"a": 1}, b"1234", "offsets"),
        (b"{" * 50_000, b"", "deep|JSON"),
        (b"[]", b"", "object"),
    ],
)
def test_headers_that_lie_are_corrupt(tmp_path, header, data, what):
    with pytest.raises(CorruptError, match=what):
        files.read_header(raw(tmp_path / "x.safetensors", header, data))


def test_a_header_of_100_mb_is_neither_believed_nor_read(tmp_path):
    claimed = tmp_path / "claimed.safetensors"
    claimed.write_bytes((100 << 20).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptError, match="104,857,600"):
        files.read_header(claimed)
    real = tmp_path / "real.safetensors"
    with real.open("wb") as file:
        file.write((100 << 20).to_bytes(8, "little"))
        file.truncate(8 + (100 << 20))
    with pytest.raises(CorruptError, match="at most"):
        files.read_header(real)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])
def test_a_pickle_under_a_safe_name_is_named_as_one(tmp_path, start):
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + b"x" * 100)
    with pytest.raises(CorruptError, match="pickle"):
        files.read_header(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 199), st.integers(0, 255))
def test_no_byte_of_a_header_raises_anything_but_corrupt(tmp_path, place, value):
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


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "target"
    with files.complete_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.complete_directory(target, replace=True) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["old"]
    with files.complete_directory(target, replace=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_whichever_system_call_fails_the_old_folder_is_whole(tmp_path, monkeypatch, exchange):
    """Fail the N-th sync, rename or exchange, for N = 1, 2, …, until none fails."""
    target = tmp_path / "target"
    calls = {"left": 0}

    def failing(function):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(files, "_exchange", failing(files._exchange if exchange else lambda first, second: False))
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    for attempt in range(1, 50):
        calls["left"] = 0
        with files.complete_directory(target, replace=True) as folder:
            (folder / "a").write_text("old")
        calls["left"] = attempt
        try:
            with files.complete_directory(target, replace=True) as folder:
                (folder / "a").write_text("new")
        except ResourceError as error:
            assert "No space left" in str(error)
        else:
            break
        holders = [target, tmp_path / ".target.old"]
        found = [(holder / "a").read_text() for holder in holders if holder.exists()]
        assert found
        assert set(found) <= {"old", "new"}
    assert calls["left"] > 0
    assert attempt > 4


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "target").mkdir()
    with files.complete_directory(tmp_path / "target") as folder:  # an empty one may be filled
        (folder / "a").write_text("1")
    with pytest.raises(InputError, match="exists"), files.complete_directory(tmp_path / "target"):
        pass


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"), files.complete_directory(tmp_path / "file" / "x"):
        pass
