"""Arrays of different lengths in one flat buffer, the layout of a file's examples in memory and in the cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np


class Ragged:
    """Arrays of one dtype and rank, concatenated in one flat buffer; indexing returns a view.

    Attributes:
        values: [n] all elements.
        shapes: [arrays, rank] int64.
    """

    def __init__(self, values: np.ndarray, shapes: np.ndarray) -> None:
        self.values, self.shapes = values, shapes
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
        return self.values[self._starts[index] : self._stops[index]].reshape(self.shapes[index])

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
