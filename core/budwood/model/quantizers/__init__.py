"""Quantisers of a base's linears: the interface, bitsandbytes, and the lookup of a module's quantiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from budwood.model.quantizers.bitsandbytes import FP4, NF4, Int8
from budwood.model.quantizers.protocol import Quantizer, Unquantized, is_transposed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "FP4", "NF4", "Int8", "Quantizer", "Unquantized", "claim", "is_quantized", "is_transposed", "linear_shape",
    "linear_weight", "quantizer_of",
]  # fmt: skip

_MARK = "_budwood_quantizer"
_KNOWN = (Int8(), NF4(), FP4(), Unquantized())
"""Quantisers whose linears are recognised on any model; those of others are marked when the base loads."""


def claim(model: nn.Module, quantizer: Quantizer) -> None:
    """Mark the linears that `quantizer` stores, so that `quantizer_of` returns it."""
    for module in model.modules():
        if quantizer.is_linear(module):
            module.__dict__[_MARK] = quantizer


def quantizer_of(module: nn.Module) -> Quantizer | None:
    """Return the quantiser that stores a linear module; None if it is not a linear."""
    quantizer: Quantizer | None = module.__dict__.get(_MARK)
    if quantizer is None:
        quantizer = next((known for known in _KNOWN if known.is_linear(module)), None)
        if quantizer is not None:
            module.__dict__[_MARK] = quantizer
    return quantizer


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a linear with a quantised weight."""
    quantizer = quantizer_of(module)
    return quantizer is not None and not isinstance(quantizer, Unquantized)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return the number of outputs and inputs of a linear module, quantised or not, also if wrapped in PEFT layers.

    For fused experts they are those of one expert.

    Raises:
        TypeError: the module is not a linear.
    """
    from budwood.model.quantizers.experts import ExpertLinear  # imports torch

    inner = _inner(module)
    if isinstance(inner, ExpertLinear):
        return inner.out_features, inner.in_features
    return _quantizer(inner).shape(inner)


def linear_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return W [out, in] in `dtype` as a linear module computes with it: a new tensor, dequantised if need be.

    Raises:
        TypeError: the module is not a linear.
    """
    inner = _inner(module)
    return _quantizer(inner).dequantized(inner, dtype).detach().clone()


def _inner(module: nn.Module) -> Any:
    """Return the linear inside of PEFT's layers."""
    inner: Any = module
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner


def _quantizer(inner: nn.Module) -> Quantizer:
    quantizer = quantizer_of(inner)
    if quantizer is None:
        raise TypeError(f"{type(inner).__name__} is not a linear module")
    return quantizer
