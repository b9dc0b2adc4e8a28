"""PEFT's LoRA layers on a live model: which adapter each row uses, one autograd function a linear, taking them off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from budwood import InputError, low_rank_linear, mixed_low_rank_linear

_STATE = "_budwood_lora"


@dataclass
class LiveAdapters:
    """What LoRA keeps on a model: PEFT's wrapper around it, the selection, and biases by adapter.

    `names` is the selection: empty for none, one for every row, or one (or None) for each row.
    """

    peft: PeftModel
    names: list[str | None] = field(default_factory=list)
    base_biases: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def live(model: nn.Module) -> LiveAdapters | None:
    """Return what LoRA keeps on `model`, or None where there is no adapter of it."""
    return model.__dict__.get(_STATE)


def add_adapter(model: nn.Module, config: LoraConfig, name: str) -> LiveAdapters:
    """Put a new adapter called `name` on `model` in place, in fp32 and not in use."""
    state = live(model)
    if state is None:
        state = LiveAdapters(PeftModel(model, config, adapter_name=name))  # type: ignore[arg-type]
        model.__dict__[_STATE] = state  # past nn.Module's registration: the wrapper holds the model already
    else:
        state.peft.add_adapter(name, config)
    if config.bias != "none":
        chosen = _bias_names(model, config.bias)
        parameters = dict(model.named_parameters())
        for key in chosen:
            state.base_biases.setdefault(key, parameters[key].data)
        state.biases[name] = {key: state.base_biases[key].clone().float() for key in chosen}
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            layer.lora_A[name].float()
            layer.lora_B[name].float()
            if isinstance(layer.get_base_layer(), nn.Linear):
                layer.forward = _Forward(layer, state)  # type: ignore[method-assign]
        elif isinstance(layer, AuxiliaryTrainingWrapper) and name in getattr(layer, "modules_to_save", {}):
            layer.modules_to_save[name].float()
    model.train(model.training)  # PEFT's new modules begin in training mode, whatever the model's
    select(model, state.names)
    return state


def select(model: nn.Module, names: Sequence[str | None]) -> None:
    """Use the named adapters: none, one for every row, or one (or None) for each row.

    Raises:
        InputError: adapters that replace whole modules or biases are asked to share a batch with others.
    """
    state = live(model)
    if state is None:
        return
    distinct = set(names)
    one = next(iter(distinct)) if len(distinct) == 1 else None
    for layer in model.modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            inside = distinct & set(getattr(layer, "modules_to_save", {}))
            if inside and one is None:
                raise InputError(
                    f"adapter '{inside.pop()}' replaces whole modules and cannot share a batch with others."
                )
            layer.enable_adapters(bool(inside))
            if inside:
                layer.set_adapter(str(one))
    with_bias = distinct & set(state.biases)
    if with_bias and one is None:
        raise InputError(f"adapter '{with_bias.pop()}' replaces biases and cannot share a batch with others.")
    if state.base_biases:
        parameters = dict(model.named_parameters())
        own = state.biases.get(str(one), {})
        for key, base in state.base_biases.items():
            parameters[key].data = own.get(key, base)
    state.names = [one] if one is not None else [] if distinct <= {None} else list(names)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter off; with the last one, put the base's own modules back."""
    state = live(model)
    if state is None:
        return
    if name in state.names:
        select(model, [])
    state.biases.pop(name, None)
    if len(state.peft.peft_config) > 1:
        state.peft.delete_adapter(name)
        select(model, state.names)
    else:
        restore_modules(model)


def restore_modules(model: nn.Module) -> None:
    """Put the base's own modules back in the places of PEFT's."""
    select(model, [])
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            parent, _, leaf = path.rpartition(".")
            original = module.get_base_layer() if isinstance(module, LoraLayer) else module.original_module
            setattr(model.get_submodule(parent), leaf, original)
    model.__dict__.pop(_STATE, None)
    model.__dict__.pop("peft_config", None)


def bias_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Bias parameters that the adapter in use trains, by name."""
    state = live(model)
    chosen = state.biases.get(name, {}) if state else {}
    return {key: parameter for key, parameter in model.named_parameters() if key in chosen}


def _bias_names(model: nn.Module, which: str) -> list[str]:
    names = []
    for path, module in model.named_modules():
        bias = getattr(module, "bias", None)
        inside = isinstance(module, LoraLayer)
        if inside and isinstance(module.get_base_layer().bias, nn.Parameter):
            names.append(f"{path}.base_layer.bias")
        elif which == "all" and not inside and isinstance(bias, nn.Parameter) and ".base_layer" not in path:
            names.append(f"{path}.bias")
    if not names:
        raise InputError(f"bias: {which}: the model has no such biases; use bias: none.")
    return names


class _Forward:
    """Forward of one LoRA layer under a selection. PEFT's own code runs only for variants such as DoRA."""

    def __init__(self, layer: Any, state: LiveAdapters) -> None:
        self.layer, self.state = layer, state

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, names = self.layer, self.state.names
        base = layer.base_layer
        here = [name if name in layer.lora_A else None for name in names]
        if not any(here):
            return base(x)
        if len(here) == 1:
            return self._one(x, here[0])
        if any(name in layer.lora_variant for name in here if name):
            return torch.cat([self._one(row[None], name) for row, name in zip(x, here, strict=True)])
        distinct = list(dict.fromkeys(here))
        adapters = [self._weights(name) if name else None for name in distinct]
        return mixed_low_rank_linear(x, base, adapters, [distinct.index(name) for name in here])

    def _weights(self, name: str) -> tuple[Tensor, Tensor, float]:
        layer = self.layer
        return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]

    def _one(self, x: Tensor, name: str | None) -> Tensor:
        layer = self.layer
        if name is None:
            return layer.base_layer(x)
        if name in layer.lora_variant:
            result = layer.base_layer(x)
            x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
            return layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result).to(result.dtype)
        a, b, scaling = self._weights(name)
        dropout = layer.lora_dropout[name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
        return low_rank_linear(x, layer.base_layer, a, b, scaling, rate)
