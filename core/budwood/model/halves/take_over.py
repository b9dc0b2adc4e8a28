"""Which layers compute in halves: those whose class computes the same numbers on a small layer of its own."""

from __future__ import annotations

import copy
import functools
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import is_out_of_memory
from budwood.model.device import device_type, isolated, planned_device
from budwood.model.halves.layer import PATTERNS, Halves, Names, queries
from budwood.model.halves.shadows import Shadows
from budwood.model.ops.dropout import draw_quickly
from budwood.model.ops.gated import GatedMLP, fuse_mlps
from budwood.model.ops.rms_norm import save_memory_in_norms
from budwood.model.ops.rotary import fuse_rotations

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": 2,
}  # fmt: skip
"""Sizes of the layer that is tried, where a config has such a field."""


def use_own_operations(model: nn.Module) -> None:
    """Make a frozen base compute with Budwood's operations, which give its own numbers, or dropout of the same kind."""
    save_memory_in_norms(model)
    fuse_mlps(model)
    fuse_rotations(model)
    draw_quickly(model)
    compute_in_halves(model)


def compute_in_halves(model: nn.Module) -> int:
    """Make the layers of `model` compute in halves, where that gives their own numbers.

    Call it after `save_memory_in_norms` and `fuse_mlps`, on the norms and MLPs that these changed.

    Returns:
        The number of layers changed.
    """
    from budwood.model.recompute import layers_of

    changed, shadows = 0, Shadows()
    before: Halves | None = None
    for number, layer in enumerate(layers_of(model)):
        names = _names(layer)
        if names is not None and not isinstance(layer.__dict__.get("forward"), Halves):
            layer.forward = Halves(layer, layer.forward, names, number, shadows)
            if before is not None:
                before.following = weakref.ref(layer.forward)
            changed += 1
        own = layer.__dict__.get("forward")
        before = own if isinstance(own, Halves) else None
    return changed


def describe_others(model: nn.Module) -> str:
    """Return how many layers take the model's own forward, or have in a pass, and why; "" if that is slower for none.

    What a hook did during a pass counts once, though it is gone. Layers of a class that never computes in halves count
    on CUDA, where each operation costs the host time.
    """
    from budwood.model.recompute import layers_of

    layers = layers_of(model)
    reasons = Counter(reason for layer in layers if (reason := _obstacle(layer)) is not None)
    if not reasons:
        return ""
    several = len(reasons) > 1
    why = ", ".join(f"{reason} ({count})" if several else reason for reason, count in reasons.most_common())
    return f"{reasons.total()} of {len(layers)} layers take the model's own forward, which is slower: {why}"


def _obstacle(layer: nn.Module) -> str | None:
    own = layer.__dict__.get("forward")
    if isinstance(own, Halves):
        met, own.met = own.met, None
        return met or own.obstacle()
    first = next(layer.parameters(), None)
    on_cuda = first is not None and device_type(first) == "cuda"
    return f"{type(layer).__name__} is not known to compute in halves" if on_cuda else None


def _names(layer: Any) -> Names | None:
    """Return the names of a layer's modules, if its class is known to compute in halves."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    config = getattr(attention, "config", None)
    if attention is None or config is None or mlp is None:
        return None
    if not (queries(attention) and hasattr(attention, "o_proj")):
        return None
    dense = isinstance(mlp.forward, GatedMLP)
    cls = next(
        cls for cls in type(layer).__mro__ if not cls.__name__.startswith("FSDP")
    )  # what a sharded one is made of
    index, kinds = int(getattr(attention, "layer_idx", 0) or 0), getattr(config, "layer_types", None)
    kind = kinds[index] if kinds and index < len(kinds) else None
    try:
        return _tried(cls, _Config(config, index), kind, dense)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None  # of this layer; it is tried again


class _Config:
    """A model's config and the index of one of its layers; equal to that of other layers, and of equal configs."""

    def __init__(self, config: Any, index: int) -> None:
        self.config, self.index = config, index
        values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        self.text = f"{type(config).__qualname__} {values}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and other.text == self.text


@functools.lru_cache(maxsize=64)
def _tried(cls: type[nn.Module], key: _Config, kind: str | None, dense: bool) -> Names | None:
    """Return the names with which the halves of a small layer compute what its class does; None: there are none.

    Args:
        kind: that of the layer, such as sliding_attention, which has an answer of its own.
    """
    try:
        with isolated(), planned_device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = _small(cls, key.config, key.index, dense)
            return next((names for names in PATTERNS if _agrees(layer, names)), None)
    except Exception as error:  # a constructor with other arguments, a forward with others
        if is_out_of_memory(error):
            raise  # which may not come again, so it is not remembered
        return None


def _small(cls: Any, config: Any, index: int, dense: bool) -> Any:
    """Return a layer of a class with few parameters, in fp32."""
    config = copy.deepcopy(config)
    for name, value in SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, max(value, index + 1) if name == "num_hidden_layers" else value)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        layer = cls(config, index)
    if not dense:
        layer.mlp = _Square()
    layer = layer.to_empty(device="cpu").float()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(False).normal_(1.0 if "norm" in name else 0.0, 0.3)
    save_memory_in_norms(layer)
    fuse_mlps(layer)
    return layer.train()


class _Square(nn.Module):
    """In the place of a mixture."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x.square()


def _agrees(layer: Any, names: Names) -> bool:
    """Return whether output and gradient are those of the class's forward, up to roundings."""
    if not all(hasattr(layer, name) for name in (names.norm, names.after, names.second, names.last) if name):
        return False
    others = {name for name, _ in layer.named_children()} - {"self_attn", "mlp"}
    if others != {name for name in (names.norm, names.after, names.second, names.last, *names.drops) if name}:
        return False
    for name in names.drops:
        getattr(layer, name).p = 0.0
    attention = layer.self_attn
    attention.attention_dropout = 0.0
    size = attention.head_dim
    draw = torch.Generator().manual_seed(0)
    x, above = (torch.randn(2, 5, 32, generator=draw) for _ in range(2))
    angles = torch.rand(1, 5, size // 2, generator=draw).repeat(1, 1, 2)
    options = {"attention_mask": None, "position_embeddings": (angles.cos(), angles.sin())}
    results, halves = [], Halves(layer, layer.forward, names, 0, Shadows())
    if halves.chain(x.clone().requires_grad_(), dict(options)) is None:
        return False
    for forward in (layer.forward, halves):
        leaf = x.clone().requires_grad_()
        y = forward(leaf, **options)
        results.append((y.detach(), torch.autograd.grad(y, leaf, above)[0]))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))


__all__ = ["compute_in_halves", "describe_others"]
