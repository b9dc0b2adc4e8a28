"""PEFT's LoRA layers on a live model, and the update that each adds to its linear."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from budwood import InputError, linear_shape, linear_weight
from budwood.lowrank import (
    LowRankUpdate,
    adapter_layers,
    check_replaced,
    difference,
    exact_targets,
    expert_norms,
    experts_of,
    known_to_peft,
    register_adapter,
    stacked,
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


class ExpertUpdate(LoRAUpdate):
    """The update of every expert of a projection; with DoRA, its output is scaled by magnitude over norm."""

    def weights(self) -> tuple[Tensor, Tensor, float]:
        a, b, scaling = super().weights()
        return *stacked(a, b, self.layer.experts), scaling

    def gains(self, base: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor | None:
        magnitudes = self.layer.lora_magnitude_vector
        if self.name not in magnitudes:
            return None
        gains: Tensor = magnitudes[self.name].weight / expert_norms(base, a, b, scaling)
        return gains


class Magnitude(nn.Module):
    """DoRA's magnitudes [E, out] of the rows of all experts' weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class ExpertLayer(PlainLayer):
    """LoRA parameters for a projection of E experts, as in PEFT's layer for parameters: A [E · r, in], B [out, r · E].

    Attributes:
        experts: E.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.experts = experts_of(base_layer)

    def add(self, path: str, name: str, config: LoraConfig) -> None:
        """Add an adapter, initialised like PEFT's."""
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
        self.r[name], self.lora_alpha[name], self.lora_bias[name] = rank, alpha, False
        self.scaling[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[name] = nn.Linear(self.in_features, rank * self.experts, bias=False)
        self.lora_B[name] = nn.Linear(rank * self.experts, self.out_features, bias=False)
        self.reset_lora_parameters(name, config.init_lora_weights)
        if config.use_dora:
            base: Any = self.get_base_layer()
            a, b = stacked(self.lora_A[name].weight, torch.zeros_like(self.lora_B[name].weight), self.experts)
            device = base.stored[0].device
            self.lora_magnitude_vector[name] = Magnitude(expert_norms(base, a.to(device), b.to(device), 0.0))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates permanently to the weights of the experts."""
        base: Any = self.get_base_layer()
        for name in adapter_names or ():
            a, b = stacked(self.lora_A[name].weight, self.lora_B[name].weight, self.experts)
            update = self.scaling[name] * torch.bmm(b, a)
            if name in self.lora_magnitude_vector:
                weight = base.dequantize(0, self.experts, update.dtype)
                gain = self.lora_magnitude_vector[name].weight / expert_norms(base, a, b, self.scaling[name])
                update = gain[:, :, None] * (weight + update) - weight
            base.add(update)


def add_adapter(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Add a new adapter called `name` to `model` in place, in fp32 and inactive.

    Args:
        config: its targets are full names of linears, its `target_parameters` those of projections of experts, and its
            `modules_to_save` and the keys of its `trainable_token_indices` full names of modules.

    Raises:
        InputError: DoRA on linears that PEFT does not support; or another adapter replaces or adapts the same modules
            in a way that excludes this one.
    """
    experts = config.target_parameters or []
    check_replaced(model, [*(config.target_modules or ()), *experts])
    for path in sorted(config.target_modules or ()):
        _wrap_unsupported(model, path, config)
    if config.target_modules:  # PEFT goes by the ends of names
        linears = replace(config, modules_to_save=None, trainable_token_indices=None, target_parameters=None)
        with exact_targets():
            inject_adapter_in_model(linears, model, name)
    for path in experts:
        parent, _, leaf = path.rpartition(".")
        module: Any = model.get_submodule(path)
        if not isinstance(module, ExpertLayer):
            module = ExpertLayer(module)
            setattr(model.get_submodule(parent), leaf, module)
        module.add(path, name, config)
    wrap_whole(model, config.modules_to_save or (), name)
    wrap_tokens(model, config.trainable_token_indices or {}, name)  # type: ignore[arg-type]  # a dict here
    for _, layer in adapter_layers(model, name):
        base = layer.get_base_layer()
        device = next(chain(base.parameters(), base.buffers())).device
        layer.lora_A[name].to(device, torch.float32)
        layer.lora_B[name].to(device, torch.float32)
        if name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].to(device, torch.float32)
    register_adapter(model, TYPE, name, _update, config.bias)


def _update(layer: Any, name: str) -> LoRAUpdate:
    return (ExpertUpdate if isinstance(layer, ExpertLayer) else LoRAUpdate)(layer, name)


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


def plan_dora(dtype: torch.dtype) -> None:
    """Let PEFT's DoRA read the packed weights of a plan, tensors without values, through their quantiser.

    It changes PEFT for the rest of the process, but not what PEFT reads of any other weight.
    """
    from peft.tuners.lora import dora
    from peft.utils.integrations import dequantize_module_weight
    from torch._subclasses.fake_tensor import FakeTensor

    def weight(module: Any) -> Tensor:
        stored: Tensor = module.weight
        packed = not stored.is_floating_point() and (stored.is_meta or isinstance(stored, FakeTensor))
        return linear_weight(module, dtype) if packed else dequantize_module_weight(module)

    dora.dequantize_module_weight = weight
