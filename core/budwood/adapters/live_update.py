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

    The update of the experts of a mixture has A [E, r, in], B [E, out, r] and a gain [E, out], or `folded`, and nothing
    else.

    Attributes:
        a: A [r, in]; None: no low-rank update.
        b: B [out, r].
        scaling: factor of the update.
        gain: g [out] fp32, which multiplies both the base's output without its bias and the update, as the magnitude
            over the norm does in DoRA (Liu et al., 2024, eq. 5).
        offset: [out] fp32, added to the output.
        row_forward: a method of any other kind; it gets the base's output and changes the adapter's rows of it.
        folded: whether B contains the gain already, which then multiplies the base's output alone.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    gain: Tensor | None = None
    offset: Tensor | None = None
    row_forward: RowForward | None = None
    folded: bool = False

    @property
    def is_product(self) -> bool:
        """Whether the update is a low-rank one and nothing else."""
        return self.a is not None and self.gain is self.offset is self.row_forward is None

    @property
    def rank(self) -> int:
        """Rank of the low-rank update; 0: none."""
        return 0 if self.a is None else self.a.shape[-2]


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
        """Yield every tensor of the adapter that core knows of, without those of the base that its modules use."""
        from budwood.adapters.tokens import TokenRows  # loads PEFT

        for update in self.updates.values():
            yield from (t for t in (update.a, update.b, update.gain, update.offset) if t is not None)
        for module in self.modules.values():
            yield from module.rows.parameters() if isinstance(module, TokenRows) else module.parameters()
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
