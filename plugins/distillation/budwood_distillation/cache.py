"""A teacher's most probable tokens on disk: a folder of safetensors shards with a key of everything that affects them.

`cache.json` is the key. Shard i holds, for each label of its examples in order, `ids` [labels, k] int32 and `log_probs`
[labels, k + 1] fp32, whose last column is the total probability of all other tokens. A shard is complete or missing,
and its metadata hash covers its tensors, the key and its position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from budwood import Batch, CorruptError, Example, InputError, ResourceError, complete_file

KEY = "cache.json"
PARTIAL = ".*.partial"
"""Incomplete files of a killed run."""
SHARD_LABELS = 1 << 16
"""A shard ends with the example that brings it to this many labels."""


class TeacherCache:
    """The cache of one teacher over one sequence of examples.

    Args (on construction):
        directory: folder of the cache; need not exist.
        key: everything that affects its content, as plain JSON values, including `top_k`.
        examples: those of the run, with unique keys.

    Raises (on construction):
        InputError: the folder has other content, or a cache with a different key (the differences are listed). Two
            examples have the same key.
        CorruptError: its `cache.json` is corrupt.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any], examples: Sequence[Example]) -> None:
        self.directory, self.key = directory, dict(key)
        self.k: int = self.key["top_k"]
        counts = [len(e.labels) for e in examples]
        self.offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._index = {e.key: i for i, e in enumerate(examples)}
        if len(self._index) < len(counts):
            raise InputError(
                "cache: two examples have the same key, so the teacher's outputs for them cannot be distinguished."
            )
        self.shards = _split(self.offsets)
        self._check_key()

    @property
    def labels(self) -> int:
        """Number of labels of all examples."""
        return int(self.offsets[-1])

    def missing(self) -> list[int]:
        """Return the numbers of the missing shards."""
        return [shard for shard in range(len(self.shards)) if not self._path(shard).is_file()]

    def begin(self) -> None:
        """Create the folder and its key; remove the incomplete files of a killed run."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob(PARTIAL):
                path.unlink()
        except OSError as error:
            raise ResourceError(f"cache: {self.directory} cannot be written: {error.strerror}.") from error
        complete_file(self.directory / KEY, (json.dumps(self.key, indent=2) + "\n").encode())

    def write(self, shard: int, ids: np.ndarray, log_probs: np.ndarray) -> None:
        """Write a shard: `ids` [labels, k] int32 and `log_probs` [labels, k + 1] fp32 of its examples, in order."""
        arrays = {"ids": ids, "log_probs": log_probs}
        metadata = {"sha256": self._digest(shard, arrays)}
        complete_file(self._path(shard), lambda path: save_file(arrays, path, metadata))

    def verify(self) -> None:
        """Read every shard completely and compare its hash.

        Raises:
            CorruptError: a shard is corrupt; if it is deleted, the next run computes it again.
        """
        for shard, (first, last) in enumerate(self.shards):
            path, rows = self._path(shard), int(self.offsets[last] - self.offsets[first])
            expected = {"ids": ((rows, self.k), np.int32), "log_probs": ((rows, self.k + 1), np.float32)}
            try:
                with safe_open(path, framework="np") as file:
                    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                    recorded = (file.metadata() or {}).get("sha256")
            except (OSError, SafetensorError) as error:
                raise CorruptError(f"{path}: {error}. Delete it; the next run computes it again.") from error
            layout = {name: (array.shape, array.dtype.type) for name, array in arrays.items()}
            if layout != expected or recorded != self._digest(shard, arrays):
                raise CorruptError(
                    f"{path}: was altered after it was written (its hash differs). "
                    "Delete it; the next run computes it again."
                )

    def rows(self, batch: Batch) -> np.ndarray:
        """Return the index of each label of the batch, in the batch's order, among the labels of all examples."""
        spans = [self.offsets[i : i + 2] for i in map(self._index.__getitem__, batch.keys)]
        return np.concatenate([np.arange(*span) for span in spans])

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the teacher's ids [labels, k] int64 and log-probabilities [labels, k + 1] fp32 for a batch."""
        parts = []
        for index in map(self._index.__getitem__, batch.keys):
            shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
            span = self.offsets[index : index + 2] - self.offsets[self._firsts[shard]]
            parts.append([column[int(span[0]) : int(span[1])] for column in self._columns[shard]])
        ids, log_probs = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
        return ids.long().to(batch.labels.device), log_probs.to(batch.labels.device)

    @cached_property
    def _firsts(self) -> list[int]:
        return [first for first, _ in self.shards]

    @cached_property
    def _columns(self) -> list[tuple[Any, Any]]:
        """The two tensors of each shard, whose rows are read on access."""
        files = [safe_open(self._path(shard), framework="np") for shard in range(len(self.shards))]
        return [(file.get_slice("ids"), file.get_slice("log_probs")) for file in files]

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}.safetensors"

    def _digest(self, shard: int, arrays: Mapping[str, np.ndarray]) -> str:
        digest = hashlib.sha256(json.dumps([self.key, shard, self.shards[shard]], sort_keys=True).encode())
        for name in sorted(arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(arrays[name]).data)
        return digest.hexdigest()

    def _check_key(self) -> None:
        path, folder = self.directory / KEY, self.directory
        try:
            if not folder.exists():
                return
            if folder.is_dir() and all(entry.match(PARTIAL) for entry in folder.iterdir()):
                return
            if not path.is_file():
                raise InputError(f"cache: {folder} is not empty and not a teacher cache: choose another folder.")
            key = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResourceError(f"cache: {folder} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{path}: is not JSON. Delete the folder, or choose another one.") from error
        if not isinstance(key, dict):
            raise CorruptError(f"{path}: is not a JSON object. Delete the folder, or choose another one.")
        names = [name for name in (*self.key, *(key.keys() - self.key)) if key.get(name) != self.key.get(name)]
        if names:
            differ = ", ".join(f"{n} ({_short(key.get(n))} there, {_short(self.key.get(n))} here)" for n in names)
            raise InputError(
                f"cache: {folder} is from a different run; it differs in {differ}. "
                "Delete the folder, or choose another one."
            )


def _split(offsets: np.ndarray) -> list[tuple[int, int]]:
    """Return the first and the past-the-end example of each shard."""
    shards, first = [], 0
    for last in range(1, len(offsets)):
        if offsets[last] - offsets[first] >= SHARD_LABELS or last == len(offsets) - 1:
            shards.append((first, last))
            first = last
    return shards


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return f"{text[:12]}…" if len(text) > 40 else text
