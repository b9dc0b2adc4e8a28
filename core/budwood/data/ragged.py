"""Arrays of different lengths in one flat buffer, the layout of a file's examples in memory and in the cache."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Sequence

import numpy as np

RESIDENT, FAULT = 64_000_000, 2_097_152
"""Bytes of a mapped file that may stay in memory, and how many Linux maps at most when one of them is read."""


class Ragged:
    """Arrays of one dtype and rank, concatenated in one flat buffer; indexing returns a view.

    Attributes:
        values: [n] all elements; they may be mapped from a file, of which only a part stays in memory.
        shapes: [arrays, rank] int64.
    """

    def __init__(self, values: np.ndarray, shapes: np.ndarray) -> None:
        self._file = getattr(values, "_mmap", None)
        self._read = 0
        self.values, self.shapes = values.view(np.ndarray), shapes
        ends = np.concatenate([[0], np.cumsum(shapes.prod(1, dtype=np.int64))])
        self._starts, self._stops = ends[:-1], ends[1:]

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Ragged:
        """Concatenate arrays.

        Raises:
            ValueError: the arrays differ in rank.
        """
        if len({array.ndim for array in arrays}) > 1:
            raise ValueError(f"arrays of {sorted({array.ndim for array in arrays})} dimensions")
        rank = arrays[0].ndim if arrays else 1
        shapes = np.array([array.shape for array in arrays], dtype=np.int64).reshape(len(arrays), rank)
        empty = np.zeros(0, dtype=arrays[0].dtype if arrays else np.int64)
        return cls(np.concatenate([empty, *(np.ravel(array) for array in arrays)]), shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        array = self.values[self._starts[index] : self._stops[index]].reshape(self.shapes[index])
        if self._file is not None:
            self._read += max(array.nbytes, FAULT)
            if self._read > RESIDENT:
                self.release()
        return array

    def release(self) -> None:
        """Let go of the memory that a mapped file takes; what is read again comes from the system's cache."""
        self._read = 0
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)

    def select(self, indices: np.ndarray) -> Ragged:
        """Return the arrays at `indices`, ascending; they share `values`, which is not copied."""
        chosen = copy.copy(self)
        chosen.shapes = self.shapes[indices]
        chosen._starts, chosen._stops = self._starts[indices], self._stops[indices]
        return chosen

    def index_at(self, position: int) -> int:
        """Return the index of the array that holds `values[position]`."""
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def span(self, index: int) -> slice:
        """Slice of `values` that holds the array at `index`."""
        return slice(int(self._starts[index]), int(self._stops[index]))
