"""Adapters on the fused experts of a mixture: their forward, and their place in PEFT's layout.

An adapter of a projection has a low-rank update for every expert: A [E, r, in] and B [E, out, r]. PEFT stores those of
its `target_parameters` as lora_A [E · r, in], expert by expert, and lora_B [out, r · E], rank by rank. It nests a layer
for each parameter around the module of the experts, in the order of the parameters, so that the last one has the
module's own path in the file, and each before it one more `base_layer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from budwood.adapters.targets import base_modules
from budwood.model.ops.experts import Routing
from budwood.model.quantizers.experts import ExpertLinear

if TYPE_CHECKING:
    from budwood.adapters.peft_layers import LiveAdapters, LowRankUpdate


class ExpertForward:
    """The forward of one adapted projection of experts, for the current selection of adapters."""

    def __init__(self, base: Any, state: LiveAdapters) -> None:
        self.base, self.state = base, state
        self.updates: dict[str, LowRankUpdate] = {}
        self.factors: dict[str, Any] = {}  # nothing is cached

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        state, base = self.state, self.base
        names = [name for name in state.names if name in self.updates]
        if not names:
            y: Tensor = base(x, routing)
            return y
        if not state.index:
            return self.updates[names[0]].expert_forward(x, base, routing)
        owner = torch.tensor(state.index, device=x.device).index_select(0, rows_of(routing, len(state.index)))
        y = base(x, routing)
        for name in names:
            mine = (owner == state.names.index(name)).nonzero()[:, 0]
            part = self.updates[name].expert_forward(x.index_select(0, mine), base, routing.part(mine))
            y = y.index_copy(0, mine, part)
        return y


def rows_of(routing: Routing, count: int) -> Tensor:
    """Return the row of a batch of `count` rows, or its position, that each routed token belongs to.

    Raises:
        ValueError: the tokens are not those of so many rows.
    """
    width, rest = divmod(routing.shape[0], count)
    if rest or not width:
        raise ValueError(f"adapters were selected for {count} rows, but the experts got {routing.shape[0]} tokens")
    return routing.tokens // width


def stacked(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A [E, r, in] and B [E, out, r] of PEFT's lora_A [E · r, in] and lora_B [out, r · E]; views."""
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


@torch.no_grad()
def expert_norms(base: ExpertLinear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the norms [E, out] fp32 of the rows of W_e + scaling · B_e A_e, for A [E, r, in] and B [E, out, r]."""
    norms = torch.empty(base.experts, base.out_features, device=a.device)
    for expert in range(base.experts):
        weight = base.dequantize(expert, expert + 1, torch.float32)[0]
        norms[expert] = torch.linalg.norm(
            torch.addmm(weight, b[expert].float(), a[expert].float(), alpha=scaling), dim=1
        )
    return norms


def split_targets(model: nn.Module, targets: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the targets that are linears, and those that are projections of experts."""
    fused = {name for name, module in base_modules(model) if isinstance(module, ExpertLinear)}
    names = list(targets)
    return [name for name in names if name not in fused], [name for name in names if name in fused]


def file_paths(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """Return the path of each target in PEFT's file: its own, or for experts that of the nested layers.

    Args:
        targets: full names of all modules that the adapter adapts.
    """
    found = {name: name for name in targets}
    nested: dict[str, list[str]] = {}
    for name, module in base_modules(model):
        if name in found and isinstance(module, ExpertLinear):
            nested.setdefault(name.rpartition(".")[0], []).append(name)
    for owner, names in nested.items():
        for depth, name in enumerate(reversed(names)):
            found[name] = ".".join([owner, *["base_layer"] * depth])
    return found
