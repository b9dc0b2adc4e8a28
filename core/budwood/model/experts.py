"""Counts fused experts of a mixture of experts: linears stored as one parameter [experts, out, in]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


_COUNTS = ("num_experts", "num_routed_experts", "moe_num_experts")
"""Names by which modules of transformers give their number of experts."""


@dataclass(frozen=True)
class Experts:
    """Number of fused experts in a model, over all layers.

    Attributes:
        total: all fused experts.
        quantized: those with quantised weights.
        trained: those with trainable parameters: adapters, or the experts themselves.
    """

    total: int = 0
    quantized: int = 0
    trained: int = 0


def count_experts(model: nn.Module) -> Experts:
    """Count the fused experts of a model, which may have adapters."""
    total = quantized = trained = 0
    for path, experts, parameters in _fused(model):
        total += experts
        quantized += 0 if any(p.is_floating_point() for p in parameters) else experts
        outer = path.split(".base_layer")[0].split(".original_module")[0]  # the PEFT layer around it, if any
        trained += experts if any(p.requires_grad for p in model.get_submodule(outer).parameters()) else 0
    return Experts(total, quantized, trained)


def _fused(model: nn.Module) -> Iterator[tuple[str, int, list[nn.Parameter]]]:
    """Yield the modules with fused experts as in transformers: path, number of experts, and their parameters.

    These are [experts, …, …] or, in DBRX, [experts · inner, …].
    """
    for path, module in model.named_modules():
        experts = next((count for name in _COUNTS if isinstance(count := getattr(module, name, None), int)), 0)
        stacked = isinstance(getattr(module, "moe_num_experts", None), int)
        fused = [
            p
            for p in module.parameters(recurse=False)
            if (p.ndim == 3 and len(p) == experts) or (stacked and p.ndim == 2 and experts and len(p) % experts == 0)
        ]
        if fused:
            yield path, experts, fused
