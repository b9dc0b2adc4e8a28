"""The forward of one module for the adapters of a batch's rows: one for all rows, or one for each.

In a mixed batch the base's output of all rows comes first, in one call, so that rows without an adapter are bitwise
those of the base; each adapter then changes its own rows. For prefill, adapters are computed one after the other from
their own tensors. For decoding, where a row is one position, they are computed in two batched products over stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.adapters.live_update import LiveAdapter, LiveUpdate
from budwood.model.ops.linear import frozen_linear, live_linear, low_rank_linear, thin_product

if TYPE_CHECKING:
    from budwood.adapters.live_table import LiveModule

Change = Callable[[Tensor, Tensor], Tensor]
"""Takes a module's input and output of all rows, and returns the output with an adapter's rows changed."""
BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Ranks to which stacked adapters are padded."""


class UnmixableError(Exception):
    """A module's input does not show which of its parts belongs to which row, so adapters cannot share the batch."""


class Layout:
    """Which rows of a batch belong to which adapter; index tensors are made once for all modules."""

    def __init__(self, rows: Sequence[LiveAdapter | None]) -> None:
        self.rows = rows
        self.distinct = list(dict.fromkeys(rows))
        self._tensors: dict[Any, Tensor] = {}

    def members(self, adapter: LiveAdapter | None) -> list[int]:
        """Return the rows of an adapter."""
        return [row for row, other in enumerate(self.rows) if other is adapter]

    def tensor(self, values: Sequence[int], device: torch.device) -> Tensor:
        """Return row numbers as a tensor."""
        key = (tuple(values), device)
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(values, dtype=torch.int64, device=device)
        return self._tensors[key]


def alone(live: LiveModule, adapter: LiveAdapter) -> Callable[..., Tensor]:
    """Return the forward in which one adapter computes all rows, with the operations of a training run."""
    module, base = adapter.modules.get(live.path), live.module
    if module is not None:
        return partial(_inside, live, module)
    update, bias = adapter.updates.get(live.path), adapter.biases.get(live.path)
    inner = live.plain if update is None else _updated(live, update)
    if bias is None:
        return inner

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with _bias(base, bias):
            return inner(*args, **kwargs)

    return forward


def _inside(live: LiveModule, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Call what replaces a module, in which that module and its quantiser are the base's."""
    live.busy = True
    try:
        return function(*args, **kwargs)
    finally:
        live.busy = False


def _updated(live: LiveModule, update: LiveUpdate) -> Callable[[Tensor], Tensor]:
    base, a, b, scaling = live.module, update.a, update.b, update.scaling

    def forward(x: Tensor) -> Tensor:
        if update.gain is not None:
            y = _with_gain(x, live.plain(x), update, base.bias)
        elif a is None or b is None:
            y = live.plain(x)
        else:
            y = _product(live, x, a, b, scaling)
        if update.offset is not None:
            y = y + update.offset.to(y.dtype)
        if update.row_forward is not None:
            whole = y if y.dim() == 3 else y.reshape(1, -1, y.shape[-1])
            one = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
            update.row_forward(one, whole, torch.arange(len(whole), device=y.device))
            y = whole.view(y.shape)
        return y

    return forward


def _product(
    live: LiveModule, x: Tensor, a: Tensor | None = None, b: Tensor | None = None, scaling: float = 1
) -> Tensor:
    live.busy = True  # a quantiser may call the module
    try:
        if torch.is_grad_enabled() and x.requires_grad:  # an attack in `budwood eval` differentiates by the input
            return (
                frozen_linear(x, live.module)
                if a is None or b is None
                else low_rank_linear(x, live.module, a, b, scaling)
            )
        return live_linear(x, live.module, a, b, scaling)
    finally:
        live.busy = False


def _with_gain(x: Tensor, y: Tensor, update: LiveUpdate, bias: Tensor | None) -> Tensor:
    """Return DoRA's output, computed as in PEFT's layer."""
    a, b, gain = update.a, update.b, update.gain
    assert gain is not None
    own = y if bias is None else y - bias
    if a is None or b is None:
        return (y + (gain - 1) * own).to(y.dtype)
    inner = F.linear(F.linear(x.to(a.dtype), a), b)
    if update.folded:
        return (y + ((gain - 1) * own + inner * update.scaling)).to(y.dtype)
    return (y + ((gain - 1) * own + gain * inner * update.scaling)).to(y.dtype)


@contextmanager
def _bias(base: Any, bias: Tensor) -> Iterator[None]:
    old = base.bias.data
    base.bias.data = bias
    try:
        yield
    finally:
        base.bias.data = old


def mixed(
    live: LiveModule, layout: Layout, adapters: list[LiveAdapter], stacks: Stacks | None
) -> Callable[[Tensor], Tensor]:
    """Return the forward for rows with different adapters, of which `adapters` have an entry for this module."""
    count, plain = len(layout.rows), live.plain
    if live.quantizer is not None:
        plain = partial(_product, live)  # the same values as the module's own forward, at less cost
    changes = [*_replaced(live, layout, adapters), *_affine(live, layout, adapters)]
    changes += _low_rank(live, layout, adapters, stacks)
    for adapter in adapters:
        update = adapter.updates.get(live.path)
        if update is not None and update.row_forward is not None:
            changes.append(_own(update.row_forward, layout, adapter))

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not live.by_row or len(x) != count or (x.is_floating_point() and x.dim() < 3):
            raise UnmixableError(f"'{live.path}' gets {list(x.shape)} for {count} rows")
        y = plain(x)
        for change in changes:
            y = change(x, y)
        return y

    return forward


def _own(row_forward: Callable[[Tensor, Tensor, Tensor], None], layout: Layout, adapter: LiveAdapter) -> Change:
    members = layout.members(adapter)

    def change(x: Tensor, y: Tensor) -> Tensor:
        row_forward(x, y, layout.tensor(members, y.device))
        return y

    return change


def _replaced(live: LiveModule, layout: Layout, adapters: list[LiveAdapter]) -> Iterator[Change]:
    """Yield the changes of adapters that replace the module; one with a longer vocabulary widens the output."""
    for adapter in adapters:
        module = adapter.modules.get(live.path)
        if module is None:
            continue

        members = layout.members(adapter)

        def change(x: Tensor, y: Tensor, module: Any = module, members: list[int] = members) -> Tensor:
            rows = layout.tensor(members, y.device)
            part, given = x.index_select(0, rows), getattr(module, "given", None)
            own = _inside(live, given, part, y.index_select(0, rows)) if given else _inside(live, module, part)
            own = own.to(y.dtype)
            wider = own.shape[-1] - y.shape[-1]
            if wider > 0:
                y = F.pad(y, (0, wider), value=float("-inf"))  # tokens that the other rows' vocabulary lacks
            elif wider < 0:
                own = F.pad(own, (0, -wider), value=float("-inf"))
            return y.index_copy(0, rows, own)

        yield change


def _affine(live: LiveModule, layout: Layout, adapters: list[LiveAdapter]) -> Iterator[Change]:
    """Yield the changes by gains, biases and offsets: y[rows] = g · y[rows] + shift."""
    bias: Any = getattr(live.module, "bias", None)
    for adapter in adapters:
        update, own = adapter.updates.get(live.path, LiveUpdate()), adapter.biases.get(live.path)
        if adapter.modules.get(live.path) is not None or (own is None and update.gain is None is update.offset):
            continue
        used, members = bias if own is None else own, layout.members(adapter)
        shift: Any = 0.0
        if update.gain is not None and bias is not None:
            shift = used - update.gain * bias
        elif own is not None:
            shift = own - bias
        if update.offset is not None:
            shift = shift + update.offset

        def change(
            x: Tensor, y: Tensor, gain: Any = update.gain, shift: Any = shift, members: list[int] = members
        ) -> Tensor:
            rows = layout.tensor(members, y.device)
            part = y.index_select(0, rows)
            part = part * gain + shift if gain is not None else part + shift
            return y.index_copy(0, rows, part.to(y.dtype))

        yield change


def _factors(update: LiveUpdate) -> tuple[Tensor, Tensor, float]:
    """Return A, B with the gain, and the scale."""
    assert update.a is not None and update.b is not None
    if update.gain is None or update.folded:
        return update.a, update.b, update.scaling
    return update.a, (update.b * update.gain[:, None]).to(update.b.dtype), update.scaling


def _low_rank(live: LiveModule, layout: Layout, adapters: list[LiveAdapter], stacks: Stacks | None) -> Iterator[Change]:
    """Yield the changes by low-rank updates."""
    low_rank = [adapter for adapter in adapters if (u := adapter.updates.get(live.path)) is not None and u.rank]
    if stacks is None or len(low_rank) < 2:
        for adapter in low_rank:
            yield _segment(layout.members(adapter), layout, *_factors(adapter.updates[live.path]))
        return
    buckets: dict[int, list[LiveAdapter]] = {}
    for adapter in low_rank:
        rank = adapter.updates[live.path].rank
        buckets.setdefault(next((size for size in BUCKETS if size >= rank), rank), []).append(adapter)
    for rank, members in buckets.items():
        stacked = stacks.place(live, rank, members) if len(members) > 1 else {}
        if stacked:
            yield _stacked(stacks.of(live, rank), stacked, layout)
        for adapter in members:
            if adapter not in stacked:
                yield _segment(layout.members(adapter), layout, *_factors(adapter.updates[live.path]))


def _segment(members: list[int], layout: Layout, a: Tensor, b: Tensor, scaling: float) -> Change:
    """Return the change of the rows of one adapter, from its own tensors; neighbouring rows are changed in place."""
    start, stop = members[0], members[-1] + 1
    adjacent, down, up = len(members) == stop - start, a.t(), b.t()

    def change(x: Tensor, y: Tensor) -> Tensor:
        if adjacent and y.is_contiguous():
            part = x[start:stop].reshape(-1, x.shape[-1]).to(y.dtype)
            y[start:stop].view(-1, y.shape[-1]).addmm_(thin_product(part, down), up, alpha=scaling)
            return y
        rows = layout.tensor(members, y.device)
        part = x.index_select(0, rows).to(y.dtype)
        narrow = thin_product(part.reshape(-1, part.shape[-1]), down)
        return y.index_add_(0, rows, (narrow @ up).view(len(members), -1, y.shape[-1]), alpha=scaling)

    return change


def _stacked(stack: Stack, slots: dict[LiveAdapter, int], layout: Layout) -> Change:
    """Return the change of the rows of several adapters in two batched products over their slots."""
    top = max(slots.values()) + 1
    by_slot: list[list[int]] = [[] for _ in range(top)]
    for adapter, slot in slots.items():
        by_slot[slot] += layout.members(adapter)  # the same content may be loaded twice
    most = max(map(len, by_slot))
    identity = most == 1 and [rows[0] if rows else -1 for rows in by_slot] == list(range(len(layout.rows)))
    gather = [row for rows in by_slot for row in (*rows, *[0] * (most - len(rows)))]
    rows = [row for members in by_slot for row in members]
    found = [slot * most + i for slot, members in enumerate(by_slot) for i in range(len(members))]
    down, up = stack.a[:top].transpose(1, 2), stack.b[:top]

    def change(x: Tensor, y: Tensor) -> Tensor:
        x = x.to(y.dtype)
        if identity and y.shape[1] == 1 and y.is_contiguous():
            return y.baddbmm_(torch.bmm(x, down), up)
        device, width = y.device, x.shape[1]
        part = x.index_select(0, layout.tensor(gather, device)).view(top, most * width, -1)
        update = torch.bmm(torch.bmm(part, down), up).view(top * most, width, -1)
        return y.index_add_(0, layout.tensor(rows, device), update.index_select(0, layout.tensor(found, device)))

    return change


class Stack:
    """Copies of A [slots, r, in] and scaling · B [slots, r, out] of one module, padded with zeros to one rank."""

    def __init__(self, update: LiveUpdate, rank: int) -> None:
        assert update.a is not None and update.b is not None
        self.a = update.a.new_empty(0, rank, update.a.shape[1])
        self.b = update.b.new_empty(0, rank, update.b.shape[0])
        self.holds: list[str] = []

    def grow(self, count: int) -> None:
        """Have at least so many slots."""
        more = count - len(self.holds)
        if more > 0:
            self.a = torch.cat([self.a, self.a.new_zeros(more, *self.a.shape[1:])])
            self.b = torch.cat([self.b, self.b.new_zeros(more, *self.b.shape[1:])])
            self.holds += [""] * more

    def write(self, slot: int, key: str, update: LiveUpdate) -> None:
        """Copy an adapter to a slot, unless it is there."""
        if self.holds[slot] == key:
            return
        a, b, scaling = _factors(update)
        self.a[slot].zero_()[: len(a)] = a
        self.b[slot].zero_()[: len(a)] = b.t()
        self.b[slot].mul_(scaling)
        self.holds[slot] = key


class Stacks:
    """The stacks of all modules, under a budget of bytes. An adapter has the same slot in all stacks of a rank."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._stacks: dict[tuple[str, int], Stack] = {}
        self._slots: dict[int, dict[str, int]] = {}  # by rank: slot of each adapter

    def of(self, live: LiveModule, rank: int) -> Stack:
        """Return the stack of a module for adapters of one rank."""
        return self._stacks[live.path, rank]

    def place(self, live: LiveModule, rank: int, adapters: list[LiveAdapter]) -> dict[LiveAdapter, int]:
        """Return the slots of adapters in a module's stack, in which they are now; none, if the budget is too small."""
        slots = self._slots.setdefault(rank, {})
        wanted = {adapter.key for adapter in adapters}
        for key in wanted & slots.keys():
            if slots[key] >= 2 * len(adapters):  # unused slots below an adapter's cost as much as used ones
                del slots[key]
        for adapter in adapters:
            if adapter.key not in slots:
                slots[adapter.key] = self._free(slots, wanted, len(adapters))
        update = adapters[0].updates[live.path]
        stack = self._stacks.get((live.path, rank)) or Stack(update, rank)
        assert update.a is not None and update.b is not None
        each = rank * (update.a.shape[1] + update.b.shape[0]) * update.a.element_size()
        held = len(stack.holds)
        top = max(held, *(slots[key] + 1 for key in wanted))
        left = (self.budget - self.bytes) // each
        if top - held > left:
            return {}
        if top > held:
            stack.grow(min(max(top, held + held // 2), held + left))  # fewer copies while rows join one by one
        for adapter in adapters:
            stack.write(slots[adapter.key], adapter.key, adapter.updates[live.path])
        self.bytes += (len(stack.holds) - held) * each
        self._stacks[live.path, rank] = stack
        return {adapter: slots[adapter.key] for adapter in adapters}

    def _free(self, slots: dict[str, int], wanted: set[str], count: int) -> int:
        """Return the lowest slot below `count` that no wanted adapter holds; an adapter that is in it leaves."""
        taken = {slot for key, slot in slots.items() if key in wanted}
        slot = next(number for number in range(count + len(taken)) if number not in taken)
        for key in [key for key, other in slots.items() if other == slot]:
            del slots[key]
        return slot

    def drop(self, key: str) -> None:
        """Forget an adapter; without adapters the memory is freed."""
        for slots in self._slots.values():
            slots.pop(key, None)
        for stack in self._stacks.values():
            stack.holds = ["" if held == key else held for held in stack.holds]
        if not any(self._slots.values()):
            self._stacks.clear()
            self.bytes = 0
