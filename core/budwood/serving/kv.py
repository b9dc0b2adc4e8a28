"""Keys and values of the rows in flight: one slot a row, in which its positions start at 0 and grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CHUNK = 64
"""Slots grow by at least so many positions."""


@dataclass
class Pass:
    """Where one forward pass writes and reads.

    Attributes:
        slots: slot of each row of the pass.
        starts: position of each row's first token of the pass; counts: number of its tokens, without padding.
        width: number of positions that are read.
        index: `slots` as a tensor; at: `starts` likewise.
        leading: whether the rows are the first slots, in order, which are read without a copy.
        fresh: whether every row starts at 0, so that nothing is read from the cache.
    """

    slots: list[int]
    starts: list[int]
    counts: list[int]
    width: int
    index: Tensor
    at: Tensor
    leading: bool
    fresh: bool


class RowLayer(CacheLayerMixin):
    """The keys and values of one layer, [slots, heads, positions, d]."""

    keys: Any
    values: Any

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots; their shape is known with the first keys and values."""
        slots, positions = self.cache.slots, self.cache.positions
        self.keys = key_states.new_zeros(slots, key_states.shape[1], positions, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], positions, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values, and return those to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now, count = self.cache.now, key_states.shape[2]
        assert now is not None
        if count == 1:
            self.keys[now.index, :, now.at] = key_states[:, :, 0]
            self.values[now.index, :, now.at] = value_states[:, :, 0]
        else:
            for row, (slot, start, own) in enumerate(zip(now.slots, now.starts, now.counts, strict=True)):
                self.keys[slot, :, start : start + own] = key_states[row, :, :own]
                self.values[slot, :, start : start + own] = value_states[row, :, :own]
        if now.fresh:
            return key_states, value_states
        if now.leading:
            rows = len(now.slots)
            return self.keys[:rows, :, : now.width], self.values[:rows, :, : now.width]
        return self.keys[now.index, :, : now.width], self.values[now.index, :, : now.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what is attended to."""
        now = self.cache.now
        return (query_length if now is None or now.fresh else now.width), 0

    def get_seq_length(self) -> int:
        """Return the number of positions before the pass, by which a model without position ids would count."""
        now = self.cache.now
        return 0 if now is None or now.fresh else max(now.starts)

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class RowCache(Cache):
    """Slots for the rows in flight; memory grows with the number of rows and the longest of them.

    Attributes:
        slots: number of slots; positions: length of each.
        budget: bytes up to which slots are allocated ahead, and which `fits` allows.
        now: the pass in progress.
    """

    def __init__(self, layers: int, budget: int) -> None:
        self.rows = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=[*self.rows])
        self.budget = budget
        self.slots = 0
        self.positions = 0
        self.now: Pass | None = None
        self._with: list[RowLayer] = []
        self._position_bytes = 0

    @property
    def used(self) -> list[RowLayer]:
        """The layers that hold keys and values: some models share those of other layers."""
        found = [layer for layer in self.rows if layer.is_initialized]
        if found:
            self._with = found
        return found

    def position_bytes(self) -> int:
        """Return the bytes of one position of one row; 0 while unknown."""
        if self.used and self.slots:
            self._position_bytes = sum(t[0, :, :1].nbytes for layer in self.used for t in (layer.keys, layer.values))
        return self._position_bytes

    def bytes(self) -> int:
        """Return the bytes allocated."""
        return sum(t.nbytes for layer in self.used for t in (layer.keys, layer.values) if t is not None)

    def fits(self, slots: int, positions: int) -> bool:
        """Return whether the budget allows so many rows of so many positions."""
        slots, positions = max(slots, self.slots), max(-positions // CHUNK * -CHUNK, self.positions)
        return slots * positions * self.position_bytes() <= self.budget

    def reserve(self, slots: int, positions: int) -> None:
        """Make room for so many rows and positions; what is stored stays."""
        slots, positions = max(slots, self.slots), max(-positions // CHUNK * -CHUNK, self.positions)
        if slots > self.slots and self.fits(slots + min(self.slots, 8), positions):
            slots += min(self.slots, 8)  # fewer copies while rows join one by one
        if (slots, positions) == (self.slots, self.positions):
            return
        for layer in self.used:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(slots, old.shape[1], positions, old.shape[3])
                new[: self.slots, :, : self.positions] = old
                setattr(layer, name, new)
        self.slots, self.positions = slots, positions

    def shrink(self, slots: int, positions: int) -> None:
        """Release slots and positions that no row uses."""
        slots, positions = min(slots, self.slots), min(-positions // CHUNK * -CHUNK, self.positions)
        for layer in self.used:
            layer.keys = layer.keys[:slots, :, :positions].clone()
            layer.values = layer.values[:slots, :, :positions].clone()
        self.slots, self.positions = slots, positions

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row to another slot."""
        for layer in self.used if length else ():
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def clear(self, kept: list[int]) -> None:
        """Set to 0 what no row uses, given the lengths of the rows in the first slots."""
        for layer in self.used:
            for tensor in (layer.keys, layer.values):
                for slot, length in enumerate(kept[: self.slots]):
                    tensor[slot, :, length:] = 0
                tensor[len(kept) :] = 0

    def read(self, slot: int, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Return copies of a row's keys and values, [heads, positions, d] of each layer."""
        return [(l.keys[slot, :, start:stop].clone(), l.values[slot, :, start:stop].clone()) for l in self.used]  # noqa: E741

    def write(self, slot: int, start: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Store what `read` returned at the same positions of another row."""
        for layer, (keys, values) in zip(self.used or self._with, parts, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[slot, :, start : start + keys.shape[1]] = keys
            layer.values[slot, :, start : start + keys.shape[1]] = values

    def free(self) -> None:
        """Release the memory."""
        self.position_bytes()
        for layer in self.rows:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.slots = self.positions = 0
        self.now = None

    def pass_over(self, slots: list[int], starts: list[int], counts: list[int], device: torch.device) -> Pass:
        """Return the pass that computes so many tokens of each of these rows, from these positions on."""
        count = max(counts)
        self.reserve(max(self.slots, max(slots) + 1), max(starts) + count)
        fresh = count > 1 and not any(starts)
        leading = not fresh and slots == list(range(len(slots)))
        index, at = torch.tensor(slots, device=device), torch.tensor(starts, device=device)
        return Pass(slots, starts, counts, max(starts) + count, index, at, leading, fresh)


def available(device: torch.device) -> int:
    """Return the bytes of memory that are free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
