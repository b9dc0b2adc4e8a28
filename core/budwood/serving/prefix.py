"""Keys and values of prompts, kept for later prompts that begin alike, of the same adapter, tenant and template."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

BLOCK = 64
"""Prompts are kept in whole blocks of so many tokens."""
Block = list[tuple[Tensor, Tensor]]


def namespace(identity: str, tenant: str, template: str) -> bytes:
    """Return what a request's prefixes are stored under: equal tokens have other keys and values under another adapter,
    and a tenant must not see in its latency what others asked."""
    parts = "\0".join(hashlib.sha256(part.encode()).hexdigest() for part in (identity, tenant, template))
    return hashlib.sha256(parts.encode()).digest()


class PrefixCache:
    """Blocks of keys and values under a budget of bytes; the longest unused leave first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.hits = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def find(self, space: bytes, tokens: Sequence[int]) -> list[Block]:
        """Return the blocks with which a prompt begins, without its last token, whose logits are needed."""
        found = []
        for key in self._keys(space, tokens[:-1]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found.append(self._blocks[key])
        self.hits += len(found)
        return found

    def missing(self, space: bytes, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return the blocks of a prompt that are not kept: start and key of each."""
        return [(i * BLOCK, key) for i, key in enumerate(self._keys(space, tokens)) if key not in self._blocks]

    def add(self, key: bytes, block: Block) -> None:
        """Keep a block, and drop others if the budget is exceeded."""
        self._blocks[key] = block
        self.bytes += _size(block)
        while self.bytes > self.budget and self._blocks:
            _, old = self._blocks.popitem(last=False)
            self.bytes -= _size(old)

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()
        self.bytes = 0

    def _keys(self, space: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
        if not self.budget:
            return
        key = space
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            part = np.asarray(tokens[start : start + BLOCK], dtype=np.int64).tobytes()
            key = hashlib.sha256(key + part).digest()
            yield key


def _size(block: Block) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in block)
