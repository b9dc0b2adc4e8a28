"""Headers of safetensors from strangers, and the fingerprint of a base."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from budwood.errors import CorruptError
from budwood.model.checkpoint import HEADER_LIMIT, fingerprint, read_header, read_tensors


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save(tmp_path, tensors())
    return tmp_path


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(200, 300, generator=generator),
        "b.weight": torch.randn(8, 8, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }


def save(folder, values, name="model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    save_file(values, folder / name, metadata={"format": "pt"})


def raw(path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def test_header_is_read_as_written(folder):
    entries = read_header(folder / "model.safetensors")
    for name, tensor in tensors().items():
        entry = entries[name]
        assert entry.shape == tuple(tensor.shape)
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            assert file.read(entry.end - entry.start) == tensor.flatten().view(torch.uint8).numpy().tobytes()


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "item",
    [
        GOOD | {"data_offsets": [0, 7]},
        GOOD | {"data_offsets": [8, 0]},
        GOOD | {"data_offsets": [-8, 0]},
        GOOD | {"data_offsets": [0, 8.0]},
        GOOD | {"data_offsets": [0]},
        GOOD | {"shape": [3]},
        GOOD | {"shape": [-1, -2]},
        GOOD | {"shape": [True, 2]},
        GOOD | {"shape": 2},
        {"dtype": "F32"},
        None,
        [],
    ],
)
def test_header_that_lies(tmp_path, item):
    path = tmp_path / "model.safetensors"
    raw(path, json.dumps({"x": item}).encode(), bytes(8))
    with pytest.raises(CorruptError, match="model.safetensors"):
        read_header(path)


def test_header_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)  # a hole: the file takes no room
    start = time.monotonic()
    with pytest.raises(CorruptError, match="no safetensors file"):
        read_header(path)
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"\xff\xfe", b'"x"', b"[" * 100_000, b"null"])
def test_header_that_is_no_json_object(tmp_path, header):
    path = tmp_path / "model.safetensors"
    raw(path, header)
    with pytest.raises(CorruptError):
        read_header(path)


def test_truncated_and_extended_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for keep in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CorruptError, match="truncated"):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptError, match="longer than its header says"):
        read_header(path)


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CorruptError, match="git lfs pull"):
        read_header(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail_otherwise(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except CorruptError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "part-2.safetensors"}, "part-2.safetensors is missing"),
        ({"zzz": "part-1.safetensors"}, "does not hold 'zzz'"),
        ({"a": "../part-1.safetensors"}, "does not name files of the same folder"),
        ({"a": "part-1.bin"}, "does not name files of the same folder"),
        ({"a": 1}, "does not name files of the same folder"),
        ([], "does not name files of the same folder"),
    ],
)
def test_index_that_lies(tmp_path, weight_map, message):
    save(tmp_path, tensors(), "part-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptError, match=message):
        read_tensors(tmp_path)


def test_fingerprint_does_not_depend_on_shards_or_order(folder, tmp_path):
    sharded = tmp_path / "sharded"
    values = tensors()
    names = list(reversed(values))
    save(sharded, {name: values[name] for name in names[:2]}, "part-1.safetensors")
    save(sharded, {name: values[name] for name in names[2:]}, "part-2.safetensors")
    index = {name: f"part-{1 + i // 2}.safetensors" for i, name in enumerate(names)}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert fingerprint(folder) == fingerprint(sharded)
    assert len(fingerprint(folder)) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"b.weight": t["b.weight"] + 0.1},
        lambda t: t | {"a.weight": t["a.weight"] * 1.001},
        lambda t: t | {"b.weight": t["b.weight"].view(torch.float16)},
        lambda t: t | {"b.weight": t["b.weight"].reshape(4, 16)},
        lambda t: {("c" if name == "scalar" else name): value for name, value in t.items()},
        lambda t: {name: value for name, value in t.items() if name != "empty"},
        lambda t: t | {"a.weight": t["a.weight"].index_fill(0, torch.tensor([199]), 0.0)},
    ],
    ids=["value", "scale", "dtype", "shape", "name", "removed", "last row"],
)
def test_fingerprint_sees(folder, tmp_path, change):
    other = tmp_path / "other"
    save(other, change(tensors()))
    assert fingerprint(folder) != fingerprint(other)


def test_fingerprint_of_a_large_base_takes_seconds(tmp_path):
    """723 tensors and 140 GB, as of 70 billion parameters in 16 bit; the files are holes."""
    part, per_file = 48_000_000, 40
    index = {}
    for number in range(19):
        name = f"part-{number}.safetensors"
        header = {}
        for i in range(per_file):
            key = f"layers.{number}.{i}.weight"
            header[key] = {"dtype": "BF16", "shape": [part * 2], "data_offsets": [i * part * 4, (i + 1) * part * 4]}
            index[key] = name
        text = json.dumps(header).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + per_file * part * 4)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    start = time.monotonic()
    fingerprint(tmp_path)
    assert time.monotonic() - start < 5
