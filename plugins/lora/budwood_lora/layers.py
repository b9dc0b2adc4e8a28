"""PEFT's LoRA layers on a live model, and what each of them adds to its linear."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from budwood import LowRankUpdate, adapter_layers, register_adapter

KIND = "lora"


class LoRAUpdate(LowRankUpdate):
    """scaling · B A; PEFT's own code runs for variants such as DoRA only."""

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return self.name not in self.layer.lora_variant

    def weights(self) -> tuple[Tensor, Tensor, float]:
        layer, name = self.layer, self.name
        return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        layer, name = self.layer, self.name
        if name not in layer.lora_variant:
            return super().forward(x, base)
        result = base(x)
        x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
        y: Tensor = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result).to(result.dtype)
        return y


def add_adapter(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Put a new adapter called `name` on `model` in place, in fp32 and not in use."""
    inject_adapter_in_model(config, model, name)
    for _, layer in adapter_layers(model, name):
        layer.lora_A[name].float()
        layer.lora_B[name].float()
    register_adapter(model, KIND, name, LoRAUpdate, config.bias)
