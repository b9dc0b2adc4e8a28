"""What an adapter is on a live model: entries of a table, which its owner's hook `live_adapter` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

RowForward = Callable[[Tensor, Tensor, Tensor], None]
"""`row_forward(x, y, rows)`: changes y[rows] in place. x [R, T, in] and y [R, T, out] are the input and the base's
output of all rows of a batch; `rows` [n] int64 are those of this adapter."""


@dataclass(frozen=True, eq=False)
class LiveUpdate:
    """The update of one frozen linear: y = W x + bias + scaling · B A x, or another function of x and y.

    Attributes:
        a: A [r, in]; None: no low-rank update.
        b: B [out, r].
        scaling: factor of the update.
        gain: g [out] fp32, which multiplies both the base's output without its bias and the update, as the magnitude
            over the norm does in DoRA (Liu et al., 2024, eq. 5).
        offset: [out] fp32, added to the output.
        row_forward: a method of any other kind; it gets the base's output and changes the adapter's rows of it.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    gain: Tensor | None = None
    offset: Tensor | None = None
    row_forward: RowForward | None = None

    @property
    def rank(self) -> int:
        """Rank of the low-rank update; 0: none."""
        return 0 if self.a is None else len(self.a)


@dataclass(eq=False)
class LiveAdapter:
    """An adapter as entries of a table; nothing of it is in the model's module tree.

    Attributes:
        updates: the update of each adapted linear, by the path of the base's module.
        modules: modules that replace the base's, by path; each is called as the base's module is. One that has a
            method `given(x, y)` gets the base's output too, in a batch for which that is computed anyway.
        biases: values [out] that replace the bias of a module, by path.
        key: the identity of its content; prefixes and stacks are stored under it.
        label: its name in messages.
    """

    updates: Mapping[str, LiveUpdate] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    key: str = ""
    label: str = ""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the adapter that core knows of."""
        for update in self.updates.values():
            yield from (t for t in (update.a, update.b, update.gain, update.offset) if t is not None)
        for module in self.modules.values():
            yield from module.parameters()
        yield from self.biases.values()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum({t.data_ptr(): t.nbytes for t in self.tensors()}.values())

    @property
    def paths(self) -> set[str]:
        """Paths of the base's modules whose output it changes."""
        return {*self.updates, *self.modules, *self.biases}

    def cast(self, device: torch.device, dtype: torch.dtype) -> LiveAdapter:
        """Return the adapter with A and B in the compute dtype; what is of neither dtype nor device is copied."""

        def moved(update: LiveUpdate) -> LiveUpdate:
            a, b = (None if t is None else t.to(device, dtype) for t in (update.a, update.b))
            gain, offset = (None if t is None else t.to(device) for t in (update.gain, update.offset))
            return replace(update, a=a, b=b, gain=gain, offset=offset)

        updates = {path: moved(update) for path, update in self.updates.items()}
        biases = {path: bias.to(device) for path, bias in self.biases.items()}
        return LiveAdapter(updates, self.modules, biases, self.key, self.label)


def blend(parts: Mapping[LiveAdapter, float]) -> LiveAdapter:
    """Return the weighted sum of adapters' updates, exactly: their ranks are concatenated, with w · scaling in B.

    Raises:
        ValueError: an adapter is not a sum of low-rank updates; the message says why.
    """
    found: dict[str, list[tuple[LiveUpdate, float]]] = {}
    for adapter, weight in parts.items():
        if adapter.modules or adapter.biases:
            raise ValueError(f"adapter '{adapter.label}' replaces whole modules, rows of embeddings or biases")
        for path, update in adapter.updates.items():
            if update.gain is not None or update.row_forward is not None:
                raise ValueError(f"adapter '{adapter.label}' is not a sum of low-rank updates")
            found.setdefault(path, []).append((update, weight))
    updates = {path: _concatenated(terms) for path, terms in found.items()}
    ordered = sorted(parts.items(), key=lambda part: (part[0].key, part[1]))
    key = "+".join(f"{weight!r}*{adapter.key}" for adapter, weight in ordered)
    label = "+".join(f"{weight:g}*{adapter.label}" for adapter, weight in parts.items())
    return LiveAdapter(updates, key=key, label=label)


def _concatenated(terms: list[tuple[LiveUpdate, float]]) -> LiveUpdate:
    pairs = [(u.a, u.b, weight * u.scaling) for u, weight in terms if u.a is not None and u.b is not None]
    offsets = [weight * u.offset for u, weight in terms if u.offset is not None]
    offset = torch.stack(offsets).sum(0) if offsets else None
    if not pairs:
        return LiveUpdate(offset=offset)
    return LiveUpdate(torch.cat([a for a, _, _ in pairs]), torch.cat([b * s for _, b, s in pairs], 1), offset=offset)
