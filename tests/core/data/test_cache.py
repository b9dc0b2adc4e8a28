"""The size of the token cache: which entries are deleted or kept, and valid limits."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from budwood.cli.doctor.machine import check_cache
from budwood.data import cache
from budwood.data.build import build_examples
from budwood.errors import InputError

ROW = 1000


def put(folder: Path, key: str, limit: int = cache.LIMIT) -> None:
    """Save an entry of slightly more than 4 · ROW bytes."""
    cache.save(folder, key, {"ids": np.zeros(ROW, np.int32)}, {"name": key}, limit)


def keys(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.tokens"))


def age(folder: Path, *names: str) -> None:
    """Set the entries' modification times, oldest first."""
    for seconds, name in zip(range(len(names), 0, -1), names, strict=True):
        modified = time.time() - 60 * seconds
        os.utime(folder / f"{name}.tokens", (modified, modified))


def test_the_least_recently_used_entry_is_deleted_first(tmp_path: Path) -> None:
    for key in "abc":
        put(tmp_path, key)
    size = cache.size_of(tmp_path / "a.tokens")
    age(tmp_path, "a", "b", "c")
    assert cache.load(tmp_path, "a") is not None  # a was written first but used most recently
    put(tmp_path, "d", limit=3 * size)
    assert keys(tmp_path) == ["a", "c", "d"]
    put(tmp_path, "e", limit=2 * size)
    assert keys(tmp_path) == ["d", "e"]


def test_the_new_entry_is_kept_whatever_its_size(tmp_path: Path) -> None:
    put(tmp_path, "a")
    put(tmp_path, "b", limit=10)
    assert keys(tmp_path) == ["b"]
    assert cache.load(tmp_path, "b") is not None


def test_other_files_are_kept_and_abandoned_partial_files_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    old, new = tmp_path / ".a.tokens.1.partial", tmp_path / ".b.tokens.2.partial"
    for path in (old, new):
        path.mkdir()
        (path / "ids.npy").write_bytes(b"half")
    (tmp_path / "d.safetensors").write_bytes(b"an entry of an earlier version")
    then = time.time() - 2 * cache.ABANDONED
    os.utime(old, (then, then))
    put(tmp_path, "c", limit=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "c.tokens", "notes.txt"]


@pytest.mark.parametrize(
    ("text", "limit"),
    [("", 5e9), ("2GB", 2e9), ("1.5 GiB", 1.5 * 2**30), ("500mb", 5e8), ("10K", 1e4), ("123", 123), ("0", 0)],
)
def test_the_limit(text: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDWOOD_CACHE_LIMIT", text)
    assert cache.size_limit() == limit


@pytest.mark.parametrize("text", ["many", "-1GB", "2 bananas", "1e9", "GB", "nan", "٣GB"])
def test_an_invalid_limit_is_refused_before_any_row_is_encoded(
    text: str, monkeypatch: pytest.MonkeyPatch, write: Any, byte_level: Any
) -> None:
    monkeypatch.setenv("BUDWOOD_CACHE_LIMIT", text)
    tokenizer = byte_level()
    with pytest.raises(InputError, match="BUDWOOD_CACHE_LIMIT: .* is not a size: write it like 2GB"):
        build_examples(write([{"text": "hello there"}]), tokenizer, "causal-lm", 64)


def test_a_run_respects_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, byte_level: Any) -> None:
    tokenizer = byte_level()
    monkeypatch.setenv("BUDWOOD_CACHE_LIMIT", "1")
    for name in ("a.jsonl", "b.jsonl"):
        build_examples(write([{"text": "hello there"}], name), tokenizer, "causal-lm", 64, cache_dir=tmp_path / "cache")
        assert len(list((tmp_path / "cache").iterdir())) == 1
    again = build_examples(tmp_path / "b.jsonl", tokenizer, "causal-lm", 64, cache_dir=tmp_path / "cache")
    assert again.from_cache, "the newest entry remains"


def test_doctor_prints_folder_size_and_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path))
    monkeypatch.setenv("BUDWOOD_CACHE_LIMIT", "2GB")
    (check,) = check_cache()
    assert check.values == {"folder": str(tmp_path / "tokens"), "size": 0, "limit": 2_000_000_000}
    put(tmp_path / "tokens", "a")
    (check,) = check_cache()
    assert (check.status, check.values["size"]) == ("ok", cache.size_of(tmp_path / "tokens" / "a.tokens"))
    assert f"{tmp_path}/tokens, 0.00 GB of at most 2.00 GB" in check.text
    monkeypatch.setenv("BUDWOOD_CACHE_LIMIT", "much")
    (check,) = check_cache()
    assert (check.status, "'much' is not a size" in check.text) == ("problem", True)
