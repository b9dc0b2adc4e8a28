"""What PEFT's layers start with where Budwood sets it: values read from the base's weight, and VB-LoRA's zero start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.boft import layer as boft
from peft.tuners.delora.layer import DeloraLayer
from peft.tuners.fourierft.layer import FourierFTLayer
from peft.tuners.glora.layer import GloraLinear
from peft.tuners.glora.model import GloraModel
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.supertuning.layer import SupertuningLayer
from peft.tuners.tinylora.layer import TinyLoraLayer
from peft.tuners.vblora.layer import VBLoRALayer
from peft.tuners.waveft.layer import WaveFTLayer
from torch import Tensor

from budwood import linear_weight
from budwood_peft_methods.forwards import INNER


@contextmanager
def stand_ins_accepted() -> Iterator[None]:
    """Let PEFT build its layers on stand-ins, without what it would read of weights or compile here and now.

    - BOFT: without its CUDA extension. Without butterfly factors the permutation is the identity [in, in], which PEFT
      writes element by element and keeps for each module.
    - GLoRA accepts only objects of nn.Linear itself.
    - TinyLoRA decomposes weights; `set_start` does, if a new adapter needs it.
    """
    matrix, extension = boft.BOFTLayer.perm2mat, boft.get_fbd_cuda
    module, singular = GloraModel.__dict__["_create_new_module"], TinyLoraLayer._init_svd
    boft.BOFTLayer.perm2mat = lambda self, indices: torch.eye(len(indices))
    boft.get_fbd_cuda = lambda: None
    boft.Linear.register_buffer = lambda self, name, tensor, persistent=True: setattr(self, name, None)
    GloraModel._create_new_module = staticmethod(lambda config, name, target, **_: GloraLinear(target, name, config))
    TinyLoraLayer._init_svd = _empty_decomposition
    try:
        yield
    finally:
        boft.BOFTLayer.perm2mat, boft.get_fbd_cuda = matrix, extension
        del boft.Linear.register_buffer
        GloraModel._create_new_module, TinyLoraLayer._init_svd = module, singular


def _empty_decomposition(self: Any, name: str, rank: int, fan_in_fan_out: bool) -> None:
    self.r[name] = min(rank, self.in_features, self.out_features)
    self.tinylora_A[name] = torch.zeros(self.r[name], self.in_features)
    self.tinylora_B[name] = torch.zeros(self.out_features, self.r[name])


def set_start(layers: Mapping[str, Any], config: Any, new: bool, planning: bool) -> None:
    """Complete layers that PEFT built on stand-ins, in place.

    Args:
        layers: PEFT's, by path.
        config: PEFT's.
        new: the adapter is no saved one, whose file has the values that depend on the weights.
        planning: tensors have no values, so that what depends on these is left out.
    """
    drawn: set[int] = set()
    for layer in layers.values():
        base = layer.get_base_layer().__dict__["base"]
        if planning and isinstance(layer, ShiraLayer):
            layer.shira_indices[INNER] = torch.zeros(2, len(layer.shira_weight[INNER]), dtype=torch.int)
        if isinstance(layer, DeloraLayer):  # PEFT would take the norms of the stand-in's weight
            layer.delora_w_norm[INNER] = linear_weight(base, torch.float32).norm(dim=0)
        if isinstance(layer, FourierFTLayer):  # PEFT would copy them to the device in every forward
            layer.indices[INNER] = layer.indices[INNER].to(layer.fourierft_spectrum[INNER].device)
        if isinstance(layer, WaveFTLayer):
            layer.waveft_indices[INNER] = layer.waveft_indices[INNER].to(layer.waveft_spectrum[INNER].device)
        if new and isinstance(layer, SupertuningLayer):
            size = linear_weight(base, torch.float32).abs().flatten()
            chosen = torch.topk(size, len(layer.supertuning_values[INNER]), largest=config.select_top).indices
            layer.supertuning_indices[INNER] = chosen.to(torch.int32)
        if new and isinstance(layer, TinyLoraLayer):
            _decompose(layer, linear_weight(base, torch.float32))
        if new and isinstance(layer, VBLoRALayer):
            bank = layer.vblora_vector_bank[INNER]
            if id(bank) not in drawn:  # all layers share it
                drawn.add(id(bank))
                _oppose(bank, config.init_vector_bank_bound)
            _cancel(layer.vblora_logits_B[INNER], config.topk)


def _decompose(layer: Any, weight: Tensor) -> None:
    """Set TinyLoRA's frozen factors from the weight [out, in]: W ≈ B A, each with the singular values' roots."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    rank = layer.r[INNER]
    root = s[:rank].sqrt()
    layer.tinylora_A[INNER] = (root[:, None] * v[:rank]).contiguous()
    layer.tinylora_B[INNER] = (u[:, :rank] * root).contiguous()


@torch.no_grad()
def _oppose(bank: Tensor, bound: float) -> None:
    """Make the vectors 2 i and 2 i + 1 of VB-LoRA's bank [vectors, length] opposite.

    Their elements have 12 bits, so that equally weighted sums of a few of them are exact in any order.
    """
    step = 2.0 ** (math.floor(math.log2(bound)) - 12)
    bank.div_(step).round_().mul_(step)
    pairs = len(bank) // 2
    bank[1 : 2 * pairs : 2] = -bank[: 2 * pairs : 2]


@torch.no_grad()
def _cancel(logits: Tensor, topk: int) -> None:
    """Let each of VB-LoRA's mixtures for B, logits [blocks, rank, vectors], be of opposite vectors in equal shares.

    `topk` / 2 random pairs of the bank get equal logits, a little above all others, so that B is exactly zero, while
    vectors and logits have gradients: those of the logits have the pair's own direction.
    """
    pairs = torch.rand(*logits.shape[:-1], logits.shape[-1] // 2).topk(topk // 2, dim=-1).indices.to(logits.device)
    chosen = torch.stack([2 * pairs, 2 * pairs + 1], -1).flatten(-2)
    logits.scatter_(-1, chosen, (logits.amax(-1, keepdim=True) + _GAP).expand_as(chosen))


_GAP = 1e-3
"""Of the chosen logits above all others; those have a standard deviation of 0.1 by default."""
