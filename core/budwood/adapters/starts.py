"""Low-rank adapters that start from given factors, and count from there: their update is then B A - B₀ A₀."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from budwood.adapters.peft_layers import LowRankUpdate, adapter_layers, live_adapters


def difference(a: Tensor, b: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return factors [2 r, in] and [out, 2 r] of B A - B₀ A₀; A and B themselves if there is no start.

    The factors are those of (B - B₀) A + B₀ (A - A₀), which is exactly 0 at the start, in any precision. Those of
    [B, -B₀] [A; A₀] would cancel: in 16 bits they lose what training has changed.

    Args:
        a: A [r, in].
        b: B [out, r].
        start: A₀ and B₀.
    """
    if start is None:
        return a, b
    return torch.cat([a, a - start[0]]), torch.cat([b - start[1], start[1]], 1)


def set_starts(model: nn.Module, name: str, starts: Mapping[str, tuple[Tensor, Tensor]], subtract: bool) -> None:
    """Give a new adapter of LoRA its first factors; call it in `prepare_model`, after the adapter's owner.

    Args:
        name: name of the adapter.
        starts: A [r, in] and B [out, r] of each adapted linear, by its path. r may differ from the present rank; the
            scale of the update does not change. With r = 0 the linear is no longer adapted.
        subtract: the update is the difference to this start, so that the adapter starts as the base.
    """
    for path, layer in list(adapter_layers(model, name)):
        if path not in starts:
            continue
        a, b = (tensor.detach().float().clone() for tensor in starts[path])
        if not len(a):
            _drop(model, path, layer, name)
            continue
        down, up = layer.lora_A[name], layer.lora_B[name]
        a, b = a.to(down.weight.device), b.to(up.weight.device)
        down.weight, up.weight = nn.Parameter(a), nn.Parameter(b)
        down.out_features = up.in_features = layer.r[name] = len(a)
        if subtract:
            update_of(model, layer, name).start = (a.clone(), b.clone())


def update_of(model: nn.Module, layer: nn.Module, name: str) -> LowRankUpdate:
    """Return the update of one of an adapter's layers; its `start` is A₀ and B₀, if it counts from there."""
    state = live_adapters(model)
    assert state is not None
    return state.forwards[layer.get_base_layer()].updates[name]  # type: ignore[operator]


def _drop(model: nn.Module, path: str, layer: nn.Module, name: str) -> None:
    """Remove an adapter's layer from the model."""
    state = live_adapters(model)
    assert state is not None
    base = layer.get_base_layer()  # type: ignore[operator]
    state.forwards[base].updates.pop(name)
    layer.delete_adapter(name)  # type: ignore[operator]
    if not layer.lora_A:
        state.forwards.pop(base)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
