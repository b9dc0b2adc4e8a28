"""Dequantised weights that a CPU keeps, as far as memory is left for them.

There, dequantising a 4-bit weight takes four times as long as its product with one row, and about a tenth of that with
a thousand rows. What is kept is what would be computed each time, so no result depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from budwood.model.quantizers.protocol import ROOM, Quantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SHARE = 4
"""Dequantised weights take one part in so many of the memory that is free."""


class Room:
    """Memory for the dequantised weights of a model: those that are used first are kept.

    Attributes:
        left: bytes.
    """

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Take so many bytes, if there are as many."""
        fits = size <= self.left
        self.left -= size * fits
        return fits


class Keeper:
    """Keeps the weight of one linear if it is given room, until what is stored changes."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.weight: Tensor | None = None
        self.stored: list[Tensor] = []
        self.state: list[int] = []

    def dequantized(self, quantizer: Quantizer, module: Any, dtype: torch.dtype) -> Tensor:
        """Return what `quantizer.dequantize` returns."""
        kept, packed = self.weight, quantizer.weight(module)
        if kept is not None and kept.dtype == dtype and packed is self.stored[0] and self._state() == self.state:
            return kept
        if kept is not None:  # as when an initialisation changes the base
            self.room.left += kept.nbytes
            self.weight = None
        found = quantizer.dequantize(module, dtype)
        if not found.is_inference() and self.room.take(found.nbytes):  # which no graph could use later
            self.weight, self.stored = found, [packed, *quantizer.constants(module)]
            self.state = self._state()
        return found

    def _state(self) -> list[int]:
        versions = (0 if tensor.is_inference() else tensor._version for tensor in self.stored)
        return [self.stored[0].data_ptr(), *versions]

    def __reduce__(self) -> tuple[Any, ...]:
        return Keeper, (self.room,)  # a copy of the linear begins without a weight


def keep_dequantized(model: nn.Module, free: int, dtype: torch.dtype) -> int:
    """Let the linears of a model on the CPU keep their dequantised weights; return the bytes that they may take.

    Args:
        free: bytes of memory that are left when everything else has what it needs.
        dtype: of the products.
    """
    size = min(dequantized_bytes(model, dtype), room_in(free))
    room = Room(size)
    for module, quantizer in _keeping(model) if size else ():
        module.__dict__[ROOM] = Keeper(room)
        quantizer.keep(module)
    return size


def room_in(free: int) -> int:
    """Return the bytes that dequantised weights may take of so many that are free."""
    return max(free, 0) // SHARE


def dequantized_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of all weights that `keep_dequantized` would keep if there is room for them."""
    return sum(math.prod(quantizer.shape(module)) for module, quantizer in _keeping(model)) * dtype.itemsize


def _keeping(model: nn.Module) -> Iterator[tuple[Any, Quantizer]]:
    """Yield the linears on a CPU whose forward is the product with their dequantised weight."""
    from budwood.model.device import device_type
    from budwood.model.quantizers import is_quantized, quantizer_of

    for module in filter(is_quantized, model.modules()):
        quantizer: Any = quantizer_of(module)
        if device_type(quantizer.weight(module)) == "cpu" and quantizer.dense:
            yield module, quantizer
