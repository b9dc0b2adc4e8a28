"""The safetensors files of a base, and its fingerprint."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

from budwood.errors import CorruptError
from budwood.model.checkpoint import fingerprint, read_tensors


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


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "part-2.safetensors"}, "part-2.safetensors is missing"),
        ({"zzz": "part-1.safetensors"}, "does not contain 'zzz'"),
        ({"a": "../part-1.safetensors"}, "does not name files in the same folder"),
        ({"a": "part-1.bin"}, "does not name files in the same folder"),
        ({"a": 1}, "does not name files in the same folder"),
        ([], "does not name files in the same folder"),
    ],
)
def test_inconsistent_indices(tmp_path, weight_map, message):
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
def test_fingerprint_detects(folder, tmp_path, change):
    other = tmp_path / "other"
    save(other, change(tensors()))
    assert fingerprint(folder) != fingerprint(other)


def test_fingerprint_of_a_large_base_takes_seconds(tmp_path):
    """723 tensors and 140 GB in sparse files, the size of 70 billion parameters in 16 bit."""
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
