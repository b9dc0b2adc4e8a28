"""Fused experts of a mixture: linears that stand as one parameter [experts, out, in], counted one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Experts:
    """How many fused experts a model has, over all its layers.

    Attributes:
        quantized: of them, those whose weights are stored quantised.
        trained: of them, those in whose place something trains: an adapter, or the experts themselves.
    """

    total: int = 0
    quantized: int = 0
    trained: int = 0


def count_experts(model: nn.Module) -> Experts:
    """Count the fused experts of a model, which may carry adapters."""
    total = quantized = trained = 0
    for path, parameters in _fused(model):
        experts = len(parameters[0])
        total += experts
        quantized += 0 if any(p.is_floating_point() for p in parameters) else experts
        place = path.split(".base_layer")[0].split(".original_module")[0]  # where PEFT's layers have been put around it
        trained += experts if any(p.requires_grad for p in model.get_submodule(place).parameters()) else 0
    return Experts(total, quantized, trained)


def _fused(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Modules that hold fused experts, as transformers' do: path, and parameters [experts, …, …]."""
    for path, module in model.named_modules():
        experts = getattr(module, "num_experts", None)
        found = [p for p in module.parameters(recurse=False) if p.ndim == 3 and len(p) == experts]
        if found:
            yield path, found
