"""Recomputes layers in the backward pass instead of keeping their activations (Chen et al., 2016), layer by layer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from budwood.model.offload import Offload
from budwood.model.ops.gated import tile_mlp
from budwood.model.random_state import Draws


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that transformers can recompute one by one, in the model's order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def find_problem(model: Any, setting: bool | int | str) -> str | None:
    """Return why a model cannot be recomputed as `train.gradient_checkpointing` says, with a remedy; None: it can."""
    if setting is False:
        return None
    name, layers = type(model).__name__, len(layers_of(model))
    if setting is True or layers == 0:
        if not getattr(model, "supports_gradient_checkpointing", False):
            return f"{name} cannot recompute its activations: leave it out, or lower train.micro_tokens"
        return None if setting is True else f"{name} can only recompute all of its layers or none: set true or false"
    if isinstance(setting, int) and setting > layers:
        return f"{setting} layers cannot be recomputed: the base has {layers}; give at most {layers}, or true for all"
    return None


def recompute_layers(model: Any, setting: bool | int | str, offloads: bool = False) -> None:
    """Let the first layers of a model recompute their activations, and the others keep them.

    Long rows pass the MLPs of recomputed layers in tiles (`budwood.model.ops.tiles`).

    Args:
        model: one of transformers' models, which `find_problem` accepts.
        setting: true or auto: all layers; false: none; otherwise their number.
        offloads: keep the inputs of recomputed layers in the host's memory.
    """
    layers = layers_of(model)
    if not layers:
        if setting:
            model.activation_checkpointing_enable()
        return
    count = setting if type(setting) is int else len(layers) * bool(setting)
    function = _Recompute(Offload() if offloads else None)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):  # models have it too, and then use no cache
            module._gradient_checkpointing_func = function
            module.gradient_checkpointing = count > 0
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = index < count  # type: ignore[assignment]
            tile_mlp(module, index < count)


class _Recompute:
    """Runs a layer now and again in the backward pass, with the same random numbers; given to transformers' layers."""

    def __init__(self, offload: Offload | None) -> None:
        self.offload = offload

    def __call__(self, function: Any, *inputs: Any) -> Any:
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        draws = Draws(first.device if first is not None else torch.device("cpu"))
        keeping = nullcontext() if self.offload is None else self.offload.keeping(first)
        with keeping:
            return checkpoint(
                function, *inputs, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (draws.first, draws.again),
            )  # fmt: skip
