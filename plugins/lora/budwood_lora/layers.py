"""PEFT's LoRA layers on a live model, and what each of them adds to its linear."""

from __future__ import annotations

import warnings
from itertools import chain

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from budwood import InputError, linear_shape
from budwood.lowrank import LowRankUpdate, adapter_layers, known_to_peft, register_adapter

TYPE = "lora"


class LoRAUpdate(LowRankUpdate):
    """scaling · B A; PEFT's own code runs for variants such as DoRA only."""

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return self.name not in self.layer.lora_variant

    def weights(self) -> tuple[Tensor, Tensor, float]:
        layer, name = self.layer, self.name
        return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]

    def sources(self) -> tuple[Tensor, ...]:
        return self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        layer, name = self.layer, self.name
        if name not in layer.lora_variant:
            return super().forward(x, base)
        result = base(x)
        x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
        y: Tensor = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result).to(result.dtype)
        return y


class PlainLayer(nn.Module, LoraLayer):
    """PEFT's parameters of LoRA for a linear that PEFT does not know; what is computed is `LoRAUpdate`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PEFT does not know the class
            LoraLayer.__init__(self, base_layer)
        self.out_features, self.in_features = linear_shape(self.get_base_layer())


def add_adapter(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Put a new adapter called `name` on `model` in place, in fp32 and not in use.

    Args:
        config: its targets are full names of linears.

    Raises:
        InputError: DoRA on linears that PEFT does not know.
    """
    for path in sorted(config.target_modules or ()):
        _make_known(model, path, config)
    inject_adapter_in_model(config, model, name)
    for _, layer in adapter_layers(model, name):
        base = layer.get_base_layer()
        device = next(chain(base.parameters(), base.buffers())).device
        layer.lora_A[name].to(device, torch.float32)
        layer.lora_B[name].to(device, torch.float32)
    register_adapter(model, TYPE, name, LoRAUpdate, config.bias)


def _make_known(model: nn.Module, path: str, config: LoraConfig) -> None:
    """Put a layer that PEFT adds its parameters to around a linear whose class it does not know."""
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(path)
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if known_to_peft(base) or isinstance(module, PlainLayer):
        return
    if config.use_dora:
        raise InputError(f"dora is not supported on '{path}', a {type(base).__name__}: use plain LoRA.")
    setattr(model.get_submodule(parent), leaf, PlainLayer(module))
