"""A linear whose weight stays as compressed-tensors stores it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_FIRST = ("weight_packed", "weight")


def hide_progress() -> None:
    """Hide the library's progress bars, which it draws for every base."""
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.quantization.lifecycle import apply
    from tqdm import tqdm

    for module in (model_compressor, apply):
        module.__dict__["tqdm"] = partial(tqdm, disable=True)


class PackedLinear(nn.Module):
    """x Wᵀ + bias, with W unpacked by the library in every forward."""

    def __init__(self, module: Any) -> None:
        """Take the tensors of a module that compressed-tensors has loaded, packed."""
        from compressed_tensors.compressors import BaseCompressor

        super().__init__()
        self.out_features, self.in_features = module.out_features, module.in_features
        self.scheme = module.quantization_scheme
        self.compressor: Any = BaseCompressor.get_value_from_registry(self.scheme.format.value)
        tensors = {name: t for name, t in (module._parameters | module._buffers).items() if t is not None}
        bias = tensors.pop("bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.names = sorted(tensors, key=lambda name: (name not in LARGEST_FIRST, name))
        for name in self.names:
            self.register_buffer(name, tensors[name].detach())

    def stored(self) -> list[Tensor]:
        """Return the tensors of the weight: first the packed values."""
        return [self.get_buffer(name) for name in self.names]

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in]."""
        state = {name: self.get_buffer(name) for name in self.names}
        weight: Tensor = self.compressor.decompress(state, self.scheme)["weight"]
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias in the dtype of x [..., in]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.unpacked(x.dtype), bias)
