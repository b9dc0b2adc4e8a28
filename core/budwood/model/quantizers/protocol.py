"""What a quantiser is: how the frozen linears of a base are stored, and how they compute.

A quantiser registers in the entry point group `budwood.quantizers`, under the name that recipes use.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budwood.contract.strategy import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Quantizer(Plugin):
    """How a base's linears are stored and computed. A subclass declares `api = 2`.

    The first methods load a base. The others are asked about one linear module of this quantiser, which need not be an
    `nn.Linear`; its bias, if it has one, is the attribute `bias`.
    """

    group = "budwood.quantizers"
    name: str
    """Under which it is installed, and recipes name it; the registry sets it."""
    takes_fused_experts: bool = True
    """False: three-dimensional tensors of experts would stay in 16 bit, so such a base is refused."""
    known_to_peft: bool = False
    """Whether PEFT has layers of its own for these linears, which DoRA needs."""

    def check(self, device: str) -> None:
        """Refuse a machine that cannot do it; `device` is a torch device such as "cuda:0".

        Raises:
            ResourceError: a library is missing, or does not support the device.
        """

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this `quantization_config` was saved by this quantiser."""
        return False

    def stored_config(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Return the `quantization_config` with which such a checkpoint loads to compute in `dtype`."""
        return dict(config)

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        """Return transformers' `quantization_config` for an unquantised checkpoint, or None.

        Args:
            dtype: what matrix products are computed in.
            double_quantization: quantise the quantisation constants too, where the method can.
            skip: names of modules that stay as they are (heads).
        """
        return None

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        """Change a model that has just been loaded, if the quantiser needs to: for instance, replace its linears.

        Args:
            model: in place; every parameter is frozen afterwards.
            skip: names of modules that stay as they are (heads).
        """

    def is_linear(self, module: nn.Module) -> bool:
        """Whether `module` is a linear that this quantiser stores."""
        return False

    def weight(self, module: Any) -> Tensor:
        """The tensor that holds the weight, packed or not: its device and `requires_grad` are the linear's."""
        weight: Tensor = module.weight
        return weight

    def constants(self, module: Any) -> list[Tensor]:
        """What is stored beside `weight` to restore it: scales, zero points, tables."""
        return []

    def bytes(self, module: Any) -> int:
        """Bytes of the weight as it is stored, constants included."""
        return sum({t.data_ptr(): t.nbytes for t in (self.weight(module), *self.constants(module))}.values())

    def shape(self, module: Any) -> tuple[int, int]:
        """Outputs and inputs of the stored weight."""
        return module.out_features, module.in_features

    def forward(self, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + bias, the numbers of the module's own forward, without a graph.

        Args:
            x: [n, in] in the compute dtype.
            bias: [out], the module's own, or None.

        Returns:
            [n, out] in the dtype of `x`; a fresh tensor, which the caller may change.
        """
        from torch.nn import functional

        return functional.linear(x, self.dequantize(module, x.dtype), None if bias is None else bias.to(x.dtype))

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in `dtype`, as the forward uses it; nobody changes it."""
        raise NotImplementedError(f"{self} declares linears, and no way to dequantise them")


class Unquantized(Quantizer):
    """Weights in the compute dtype: `nn.Linear`, and transformers' `Conv1D`, which holds the transposed weight."""

    api = 2
    known_to_peft = True

    def is_linear(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.Linear) or is_transposed(module)

    def shape(self, module: Any) -> tuple[int, int]:
        first, second = module.weight.shape
        return (second, first) if is_transposed(module) else (first, second)

    def forward(self, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        import torch

        weight, bias = module.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if not is_transposed(module):
            return torch.nn.functional.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = module.weight.to(dtype)
        return weight.t() if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear holds its weight as [in, out]: transformers' `Conv1D`, as GPT-2 has."""
    library = sys.modules.get("transformers.pytorch_utils")  # not imported: then nothing is of its class
    return library is not None and isinstance(module, library.Conv1D)
