"""PEFT's SVD layers on a live model: insert them, compute their updates, reduce their ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from budwood import Run, device_type, linear_shape
from budwood.lowrank import LowRankUpdate, check_replaced, experts_of, register_adapter, wrap_tokens, wrap_whole
from budwood_adalora.options import TYPE

WIDTH_STEP = 16
"""On the CPU, ranks are padded to the next multiple of this, but not beyond the largest remaining rank."""


class SVDLinear(nn.Module, AdaLoraLayer):
    """PEFT's layer with a separate rank, possibly 0, for each adapter: A [r, in], E [r, 1], B [out, r], in fp32.

    It only holds parameters; `SVDUpdate` computes the forward. On a projection of experts, r is the sum over the
    experts, each of which has a rank of its own.

    Attributes:
        width: the largest rank of each adapter in the model, by name.
        experts: number of experts; 0: a linear.
        owners: expert of each triplet, [r] int64, ascending, by adapter; empty on a linear.
    """

    other_param_names = (*AdaLoraLayer.other_param_names, "width", "owners")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a quantiser's class unknown to PEFT
            AdaLoraLayer.__init__(self, base_layer)
        self.out_features, self.in_features = linear_shape(self.get_base_layer())
        self.width: dict[str, int] = {}
        self.experts = experts_of(base_layer)
        self.owners: dict[str, Tensor] = {}

    def add(self, name: str, ranks: Sequence[int], width: int, scaling: float, dropout: float) -> None:
        """Add an adapter: singular vectors of norm 1 on average, so nearly orthonormal; singular values of zero.

        Args:
            ranks: of each expert, or the one rank of a linear.
        """
        rank = sum(ranks)
        if self.experts:
            self.owners[name] = torch.arange(self.experts).repeat_interleave(torch.tensor(ranks))
        base = self.get_base_layer()
        device = next(chain(base.parameters(), base.buffers())).device
        self.r[name], self.width[name], self.scaling[name] = rank, width, scaling
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A[name] = nn.Parameter((torch.randn(rank, self.in_features) * self.in_features**-0.5).to(device))
        self.lora_B[name] = nn.Parameter((torch.randn(self.out_features, rank) * self.out_features**-0.5).to(device))
        self.lora_E[name] = nn.Parameter(torch.zeros(rank, 1, device=device))

    def shrink(self, run: Run, name: str, keep: Tensor, width: int) -> None:
        """Keep only the triplets `keep` (indices, int64), and their state in the run's optimizer."""
        for parameters, index in ((self.lora_A, (keep,)), (self.lora_E, (keep,)), (self.lora_B, (slice(None), keep))):
            old = parameters[name]
            new = nn.Parameter(old.detach()[index].clone())
            run.replace_parameter(old, new, index)
            parameters[name] = new
        self.r[name], self.width[name] = len(keep), width
        if self.experts:
            self.owners[name] = self.owners[name][keep.cpu()]

    def ranks(self, name: str) -> list[int]:
        """Return the rank of each expert, or the one rank of a linear."""
        if not self.experts:
            return [self.r[name]]
        found: list[int] = torch.bincount(self.owners[name], minlength=self.experts).tolist()
        return found


class SVDUpdate(LowRankUpdate):
    """The update scaling · B diag(E) A; none at rank 0."""

    def weights(self) -> tuple[Tensor, Tensor, float] | None:
        layer, name = self.layer, self.name
        values = layer.lora_E[name]
        if not len(values):
            return None
        if layer.experts:
            a, b = spread(layer.lora_A[name] * values, layer.lora_B[name], layer.ranks(name))
            return a, b, layer.scaling[name]
        a, b = padded(layer.lora_A[name] * values, layer.lora_B[name], layer.width[name])
        return a, b, layer.scaling[name]

    def sources(self) -> tuple[Tensor, ...]:
        layer, name = self.layer, self.name
        return layer.lora_A[name], layer.lora_E[name], layer.lora_B[name]


def padded(a: Tensor, b: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] with zeros up to a common rank, at most `width`, on the CPU.

    oneDNN compiles a kernel for every new shape, and batches differ in length: that costs more than a few ranks save,
    while a few rows of zeros cost next to nothing. Ranks therefore share a few widths.
    """
    fill = min(width, -len(a) // WIDTH_STEP * -WIDTH_STEP) - len(a)
    if device_type(a) == "cpu" and fill:
        return F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))
    return a, b


def spread(a: Tensor, b: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return A [E, w, in] and B [E, out, w], padded with zeros to a common rank w, a multiple of 8.

    Args:
        a: [sum of ranks, in], expert by expert.
        b: [out, sum of ranks].
        ranks: rank of each expert.
    """
    width, total = max(max(ranks) + -max(ranks) % 8, 8), len(a)
    places = torch.full((len(ranks), width), total)  # the row of zeros
    start = 0
    for expert, rank in enumerate(ranks):
        places[expert, :rank] = torch.arange(start, start + rank)
        start += rank
    index = places.view(-1).to(a.device)
    wide = F.pad(a, (0, 0, 0, 1)).index_select(0, index).view(len(ranks), width, -1)
    return wide, F.pad(b, (0, 1)).index_select(1, index).view(len(b), len(ranks), width).permute(1, 0, 2)


def scale(alpha: float, initial_rank: int) -> float:
    """Return the scaling of an update as in PEFT's layer, which divides by the initial rank (plus 1e-5) at any rank."""
    return alpha / (initial_rank + 1e-5)


def add_adapter(
    model: nn.Module,
    name: str,
    ranks: Mapping[str, Sequence[int]],
    scaling: Mapping[str, float],
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
    bias: str = "none",
    tokens: Mapping[str, list[int]] | None = None,
) -> None:
    """Add a new adapter to the model in place, in fp32 and inactive.

    Args:
        ranks: the rank of each adapted linear, or those of all experts of a projection, by its path.
        scaling: factor of each update, likewise.
        modules_to_save: full names of modules that are fully trained.
        tokens: token ids whose rows are trained, by full name of the embeddings or the head.

    Raises:
        InputError: another adapter replaces or adapts the same modules in a way that excludes this one.
    """
    check_replaced(model, ranks)
    width = max(map(max, ranks.values()), default=0)
    for path, each in ranks.items():
        parent, leaf, module = _find(model, path)
        if not isinstance(module, SVDLinear):
            module = SVDLinear(module)
            setattr(parent, leaf, module)
        module.add(name, each, width, scaling[path], dropout)
    wrap_whole(model, modules_to_save, name)
    wrap_tokens(model, tokens or {}, name)
    register_adapter(model, TYPE, name, SVDUpdate, bias)


def _find(model: nn.Module, path: str) -> tuple[nn.Module, str, Any]:
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf, model.get_submodule(path)
