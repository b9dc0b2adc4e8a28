"""Checkpoints of compressed-tensors (llm-compressor, vLLM), whose weights stay packed.

The library itself would unpack the whole model in the first forward, and keep it in 16 bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budwood import InputError
from budwood_quantized.stored import Stored, needs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class CompressedTensors(Stored):
    """compressed-tensors with quantised weights: packed integers, fp8, and others of its formats."""

    api = 2
    takes_fused_experts = False  # transformers unpacks them as it reads them, and reads no others
    stored_names = r"\.weight_(packed|scale)$"

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "compressed-tensors"

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        groups = config.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, dict) else []
        inputs = any(isinstance(scheme, dict) and scheme.get("input_activations") for scheme in schemes)
        if inputs or config.get("transform_config") or config.get("kv_cache_scheme"):
            what = "inputs" if inputs else "more than weights"
            raise InputError(
                f"the base's compressed-tensors quantise {what}, which gives no exact gradient: take a base with "
                "quantised weights alone (such as W4A16), or the unquantised one with quantization nf4."
            )

    def check(self, device: str) -> None:
        needs("compressed_tensors", "compressed-tensors", self.name)

    def stored_config(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        from budwood_quantized.packed import hide_progress

        hide_progress()
        return {**config, "dequantize": False}

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        from budwood_quantized.packed import PackedLinear

        hook = model.__dict__.pop("ct_decompress_hook", None)  # it would unpack everything in the first forward
        if hook is not None:
            hook.remove()
        for path, module in list(model.named_modules()):
            if getattr(module, "quantization_scheme", None) is not None:
                model.set_submodule(path, PackedLinear(module))

    def is_linear(self, module: nn.Module) -> bool:
        from budwood_quantized.packed import PackedLinear

        return isinstance(module, PackedLinear)

    def weight(self, module: Any) -> Tensor:
        weight: Tensor = module.stored()[0]
        return weight

    def constants(self, module: Any) -> list[Tensor]:
        constants: list[Tensor] = module.stored()[1:]
        return constants

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = module.unpacked(dtype)
        return weight
