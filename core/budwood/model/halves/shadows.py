"""Factors of adapters in the dtype of the products, written for all layers at once when a pass begins."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.model.ops.group import Factors, Group, Layout, pack


@dataclass
class _Sources:
    """The parameters of a group in the last pass."""

    layout: Layout
    tensors: list[Any]  # weak references, or None

    @classmethod
    def of(cls, layout: Layout, tensors: Sequence[Tensor | None]) -> _Sources | None:
        """Return the sources; None if they are computed anew in each pass."""
        if not all(t is None or t.is_leaf for t in tensors):
            return None
        return cls(layout, [None if t is None else weakref.ref(t) for t in tensors])

    def take(self) -> list[Tensor | None] | None:
        """Return the tensors, if they still exist."""
        found = [None if t is None else t() for t in self.tensors]
        gone = any(t is None and ref is not None for t, ref in zip(found, self.tensors, strict=True))
        return None if gone else found


@dataclass
class _Ready:
    layout: Layout
    tensors: list[Tensor | None]
    versions: list[tuple[int, int] | None]
    value: Factors

    def fits(self, layout: Layout, tensors: Sequence[Tensor | None]) -> bool:
        same = all(a is b for a, b in zip(self.tensors, tensors, strict=True))
        return same and layout == self.layout and self.versions == _versions(tensors)


class Shadows:
    """The factors of a model's layers, which come one after the other; a layer that comes again begins a new pass.

    At the beginning of a pass, those of all groups of the last pass are written by one operation, and each is given
    away once. So a change of the parameters between two passes is always seen.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], _Sources] = {}
        self._ready: dict[tuple[int, int], _Ready] = {}
        self._last = -1

    @torch.no_grad()
    def factors(self, layer: int, groups: Sequence[Group], tensors: Sequence[Sequence[Tensor | None]]) -> list[Factors]:
        """Return the factors of a layer's groups.

        Args:
            layer: its number.
            tensors: of each group's parts, see `Part.tensors`.
        """
        if layer <= self._last:
            self._begin()
        self._last = layer
        factors = [
            self._take((layer, i), group.layout, given)
            for i, (group, given) in enumerate(zip(groups, tensors, strict=True))
        ]
        missing = [i for i, found in enumerate(factors) if found is None]
        made = pack([(groups[i].layout, tensors[i]) for i in missing])
        for i, value in zip(missing, made, strict=True):
            factors[i] = value
            sources = _Sources.of(groups[i].layout, tensors[i])
            if sources is not None:
                self._known[layer, i] = sources
        return factors  # type: ignore[return-value]

    def _begin(self) -> None:
        self._ready = {}
        known = [(key, one.layout, tensors) for key, one in self._known.items() if (tensors := one.take()) is not None]
        for (key, layout, tensors), value in zip(known, pack([each[1:] for each in known]), strict=True):
            self._ready[key] = _Ready(layout, tensors, _versions(tensors), value)
        self._known = {key: self._known[key] for key, *_ in known}

    def _take(self, key: tuple[int, int], layout: Layout, tensors: Sequence[Tensor | None]) -> Factors | None:
        ready = self._ready.pop(key, None)
        if ready is None or not ready.fits(layout, tensors):
            self._known.pop(key, None)
            return None
        return ready.value


def _versions(tensors: Sequence[Tensor | None]) -> list[tuple[int, int] | None]:
    return [None if tensor is None else (tensor.untyped_storage()._cdata, tensor._version) for tensor in tensors]
