"""Checkpoints of torchao: linears whose weight is a tensor of its own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budwood import InputError
from budwood_quantized.stored import Stored, needs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class TorchAO(Stored):
    """torchao's weight-only formats: int8, fp8, and int1 to int8 in groups."""

    api = 2
    stored_names = r"_qdata$"
    needs_files = True  # how each tensor is made is in the metadata of its file

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "torchao"

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        for kind in sorted(_kinds(config.get("quant_type"))):
            if "Activation" in kind:
                raise InputError(
                    f"the base is quantised with torchao's {kind}, which also quantises inputs and so gives no exact "
                    "gradient: take a base with weights alone (…WeightOnlyConfig), or the unquantised one."
                )
            if kind.startswith("Int4WeightOnly") and device is not None and device.startswith("cpu"):
                raise InputError(
                    f"the base is quantised with torchao's {kind}, which does not support a CPU: take one of "
                    "IntxWeightOnlyConfig, or the unquantised base with quantization nf4."
                )

    def check(self, device: str) -> None:
        needs("torchao", "torchao", self.name)

    def is_linear(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.Linear) and type(module.weight.data).__module__.startswith("torchao.")

    def shape(self, module: Any) -> tuple[int, int]:
        outputs, inputs = module.weight.shape
        return outputs, inputs

    def bytes(self, module: Any) -> int:
        names, _ = module.weight.data.__tensor_flatten__()
        return sum(getattr(module.weight.data, name).nbytes for name in names)

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = module.weight.data.dequantize().to(dtype)
        return weight


def _kinds(value: Any) -> set[str]:
    """Return the names of the classes in torchao's JSON of a quantisation: `_type` with `_data`, nested."""
    if isinstance(value, list):
        return set().union(*map(_kinds, value))
    if not isinstance(value, dict):
        return {value} if isinstance(value, str) and value.endswith("Config") else set()
    own = {str(value["_type"])} if str(value.get("_type", "")).endswith("Config") else set()
    return own.union(*map(_kinds, value.values()))
