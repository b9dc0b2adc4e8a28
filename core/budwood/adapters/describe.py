"""Describes which modules an adapter on a live model adapts."""

from __future__ import annotations

from torch import nn

from budwood.adapters.peft_layers import adapter_layers, canonical
from budwood.adapters.tokens import token_rows
from budwood.adapters.whole import saved_modules
from budwood.errors import plural
from budwood.model.quantizers.experts import experts_of


def describe_adapter(model: nn.Module, name: str) -> str:
    """Return a line about the modules that the adapter `name` adapts; empty if it has no PEFT layers."""
    counts: dict[str, int] = {}
    fused: dict[str, int] = {}
    for path, layer in adapter_layers(model, name):
        last, group = path.rpartition(".")[2], fused if experts_of(layer) else counts
        group[last] = group.get(last, 0) + 1
    whole = [canonical(path) for path, _ in saved_modules(model, name)]
    parts = (
        [f"{plural(sum(counts.values()), 'linear')} ({', '.join(f'{n} {last}' for last, n in counts.items())})"]
        if counts
        else []
    )
    if fused:
        parts.append("experts' " + ", ".join(f"{last} in {plural(n, 'layer')}" for last, n in fused.items()))
    if whole:
        parts.append(f"whole: {', '.join(whole[:6])}" + (f" and {len(whole) - 6:,} more" if len(whole) > 6 else ""))
    parts += [
        f"{plural(len(rows.rows[name]), 'row')} of {path}"
        for path, rows in token_rows(model, name)
        if name not in rows.tied
    ]
    return "; ".join(parts)
