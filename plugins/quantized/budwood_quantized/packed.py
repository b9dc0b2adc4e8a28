"""A linear whose weight stays as compressed-tensors stores it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_FIRST = ("weight_packed", "weight")


def hide_progress() -> None:
    """Hide the library's progress bars, which it draws for every base."""
    for name in ("compressors.model_compressors.model_compressor", "quantization.lifecycle.apply"):
        module: Any = importlib.import_module(f"compressed_tensors.{name}")
        module.tqdm = lambda items, **options: items


def planned(
    path: str, shape: tuple[int, int], config: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """Return the shapes of the tensors that the library stores a linear in, and the format that its group states.

    Both are empty for a linear that is not quantised.

    Args:
        path: the name of the linear, which `config` may single out.
    """
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    hide_progress()
    module = root = nn.Module()
    *parents, leaf = path.split(".")
    for parent in parents:
        module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    linear: Any = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    module.add_module(leaf, linear)
    apply_quantization_config(root, QuantizationConfig.model_validate(dict(config)), run_compressed=False)
    scheme = getattr(linear, "quantization_scheme", None)
    if scheme is None or scheme.weights is None:
        return {}, None
    stated = scheme.format and scheme.format.value
    compress_module(linear)
    return {name: tuple(tensor.shape) for name, tensor in linear.state_dict().items()}, stated


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
