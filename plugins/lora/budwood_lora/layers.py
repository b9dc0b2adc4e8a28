"""PEFT's LoRA layers on a live model, and the update that each adds to its linear."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import chain

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from budwood import InputError, linear_shape
from budwood.lowrank import (
    LowRankUpdate,
    adapter_layers,
    check_replaced,
    difference,
    known_to_peft,
    register_adapter,
    wrap_tokens,
    wrap_whole,
)

TYPE = "lora"


class LoRAUpdate(LowRankUpdate):
    """The update scaling · (B A x + b), b only with lora_bias; variants such as DoRA run PEFT's code."""

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return self.name not in self.layer.lora_variant and self.layer.lora_B[self.name].bias is None

    def weights(self) -> tuple[Tensor, Tensor, float]:
        layer, name = self.layer, self.name
        return *difference(layer.lora_A[name].weight, layer.lora_B[name].weight, self.start), layer.scaling[name]

    def sources(self) -> tuple[Tensor, ...]:
        return self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        layer, name = self.layer, self.name
        if name not in layer.lora_variant:
            y, bias = super().forward(x, base), layer.lora_B[name].bias
            return y if bias is None else y + (layer.scaling[name] * bias).to(y.dtype)
        result = base(x)
        x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
        changed: Tensor = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result)
        return changed.to(result.dtype)


class PlainLayer(nn.Module, LoraLayer):
    """LoRA parameters for a linear that PEFT does not support; `LoRAUpdate` computes the forward."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a class unknown to PEFT
            LoraLayer.__init__(self, base_layer)
        self.out_features, self.in_features = linear_shape(self.get_base_layer())


def add_adapter(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Add a new adapter called `name` to `model` in place, in fp32 and inactive.

    Args:
        config: its targets are full names of linears, and its `modules_to_save` and the keys of its
            `trainable_token_indices` full names of modules.

    Raises:
        InputError: DoRA on linears that PEFT does not support; or another adapter replaces or adapts the same modules
            in a way that excludes this one.
    """
    check_replaced(model, config.target_modules or ())
    for path in sorted(config.target_modules or ()):
        _wrap_unsupported(model, path, config)
    linears = replace(config, modules_to_save=None, trainable_token_indices=None)  # PEFT goes by the ends of names
    inject_adapter_in_model(linears, model, name)
    wrap_whole(model, config.modules_to_save or (), name)
    wrap_tokens(model, config.trainable_token_indices or {}, name)  # type: ignore[arg-type]  # a dict here
    for _, layer in adapter_layers(model, name):
        base = layer.get_base_layer()
        device = next(chain(base.parameters(), base.buffers())).device
        layer.lora_A[name].to(device, torch.float32)
        layer.lora_B[name].to(device, torch.float32)
    register_adapter(model, TYPE, name, LoRAUpdate, config.bias)


def _wrap_unsupported(model: nn.Module, path: str, config: LoraConfig) -> None:
    """Wrap a linear whose class PEFT does not support in a layer that PEFT can add its parameters to."""
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(path)
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if known_to_peft(base) or isinstance(module, PlainLayer):
        return
    if config.use_dora:
        raise InputError(f"dora is not supported on '{path}', a {type(base).__name__}: use plain LoRA.")
    setattr(model.get_submodule(parent), leaf, PlainLayer(module))
