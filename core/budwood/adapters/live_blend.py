"""Blends: one adapter whose change of each module's output is a weighted sum of those of others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.adapters.live_update import LiveAdapter, LiveUpdate

Term = tuple[LiveUpdate, Tensor | None, float]
"""What an adapter does to a module, the bias that it puts in place of the base's, and its weight."""


def blend(parts: Mapping[LiveAdapter, float], biases: Mapping[str, Tensor | None]) -> LiveAdapter:
    """Return the weighted sum of adapters, exactly.

    Low-rank updates: their ranks are concatenated, with w · scaling in B. DoRA changes W to g W + g s B A (g: magnitude
    over norm), so the blend's gain of W is 1 + Σ w (g - 1), and w g s goes into B. Biases: b + Σ w (b_i - b). A method
    of another kind, and what is blended with it in the same module, is computed term by term.

    Args:
        parts: weights of adapters that replace no modules.
        biases: the base's biases, by the path of the module, of those that an adapter replaces.
    """
    terms: dict[str, list[Term]] = {}
    for adapter, weight in parts.items():
        assert not adapter.modules
        for path in sorted(adapter.paths):
            part = adapter.updates.get(path, LiveUpdate()), adapter.biases.get(path), weight
            terms.setdefault(path, []).append(part)
    updates, replaced = {}, {}
    for path, found in terms.items():
        own = biases.get(path)
        if any(update.row_forward is not None for update, _, _ in found):
            updates[path] = _by_terms(found, own)
            continue
        update = _concatenated([(update, weight) for update, _, weight in found])
        if update.rank or update.gain is not None or update.offset is not None:
            updates[path] = update
        if own is not None:
            shifts = [weight * (bias - own.float()) for _, bias, weight in found if bias is not None]
            replaced[path] = own.float() + torch.stack(shifts).sum(0)
    ordered = sorted(parts.items(), key=lambda part: (part[0].key, part[1]))
    key = "+".join(f"{weight!r}*{adapter.key}" for adapter, weight in ordered)
    label = "+".join(f"{weight:g}*{adapter.label}" for adapter, weight in parts.items())
    return LiveAdapter(updates, biases=replaced, key=key, label=label)


def _concatenated(terms: list[tuple[LiveUpdate, float]]) -> LiveUpdate:
    """Return the sum of updates without methods of their own."""
    a, b, gains, offsets = [], [], [], []
    for update, weight in terms:
        if update.a is not None and update.b is not None:
            scale = weight * update.scaling
            factor = scale if update.gain is None or update.folded else scale * update.gain[..., None]
            a.append(update.a)
            b.append((update.b.float() * factor).to(update.b.dtype))
        if update.gain is not None:
            gains.append(weight * (update.gain - 1))
        if update.offset is not None:
            offsets.append(weight * update.offset)
    return LiveUpdate(
        torch.cat(a, -2) if a else None,  # of experts, A is [E, r, in] and B [E, out, r]
        torch.cat(b, -1) if b else None,
        gain=_sum(gains, 1.0),
        offset=_sum(offsets),
        folded=bool(gains),
    )


def _sum(values: list[Tensor], start: float = 0.0) -> Tensor | None:
    return start + torch.stack(values).sum(0) if values else None


def _by_terms(terms: list[Term], own: Tensor | None) -> LiveUpdate:
    """Return a method that computes what each adapter alone makes of the base's output, and sums the changes."""

    def row_forward(x: Tensor, y: Tensor, rows: Tensor) -> None:
        x, base = x.index_select(0, rows), y.index_select(0, rows)
        total = base.float()
        for update, bias, weight in terms:
            total = total + weight * (_alone(update, bias, own, x, base).float() - base.float())
        y.index_copy_(0, rows, total.to(y.dtype))

    return LiveUpdate(row_forward=row_forward)


def _alone(update: LiveUpdate, bias: Tensor | None, own: Tensor | None, x: Tensor, base: Tensor) -> Tensor:
    y = base.clone()
    if bias is not None and own is not None:
        y = y + (bias - own)
    if update.gain is not None:
        used = own if bias is None else bias
        y = y * update.gain if used is None else (y - used) * update.gain + used
    if update.a is not None and update.b is not None:
        change = F.linear(F.linear(x.to(update.a.dtype), update.a), update.b) * update.scaling
        y = y + (change if update.gain is None or update.folded else change * update.gain)
    if update.offset is not None:
        y = y + update.offset
    y = y.to(base.dtype)
    if update.row_forward is not None:
        update.row_forward(x, y, torch.arange(len(y), device=y.device))
    return y
