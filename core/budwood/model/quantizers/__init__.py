"""Quantisers of a base's linears: the protocol, bitsandbytes, and whose linear a module is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from budwood.model.quantizers.bitsandbytes import FP4, NF4, Int8
from budwood.model.quantizers.protocol import Quantizer, Unquantized, is_transposed

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FP4", "NF4", "Int8", "Quantizer", "Unquantized", "claim", "is_quantized", "is_transposed", "linear_shape",
    "quantizer_of",
]  # fmt: skip

_MARK = "_budwood_quantizer"
_KNOWN = (Int8(), NF4(), FP4(), Unquantized())
"""Whose linears are recognised on any model; another quantiser's are marked when the base loads."""


def claim(model: nn.Module, quantizer: Quantizer) -> None:
    """Mark the linears that `quantizer` stores, so that whoever meets one finds it at once."""
    for module in model.modules():
        if quantizer.is_linear(module):
            module.__dict__[_MARK] = quantizer


def quantizer_of(module: nn.Module) -> Quantizer | None:
    """The quantiser that stores a linear module; None if it is not a linear."""
    found: Quantizer | None = module.__dict__.get(_MARK)
    if found is None:
        found = next((known for known in _KNOWN if known.is_linear(module)), None)
        if found is not None:
            module.__dict__[_MARK] = found
    return found


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear that does not hold its weight in floating point as it is."""
    quantizer = quantizer_of(module)
    return quantizer is not None and not isinstance(quantizer, Unquantized)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear module, however its weight is stored, and under layers that PEFT puts around it.

    Raises:
        TypeError: the module is not a linear.
    """
    inner: Any = module
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    quantizer = quantizer_of(inner)
    if quantizer is None:
        raise TypeError(f"{type(module).__name__} is not a linear module")
    return quantizer.shape(inner)
