"""The forwards of PEFT's layers, and equal ones where PEFT's cannot be planned or cost more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.boft import layer as boft
from peft.tuners.glora.layer import GloraLayer, GloraLoraPath
from peft.tuners.hira.layer import HiraLayer
from peft.tuners.hra import HRALinear
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.peanut.layer import PeanutLayer
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.supertuning.layer import SupertuningLayer
from peft.tuners.vblora.layer import VBLoRALayer
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.layer import WaveFTLayer
from peft.tuners.waveft.waverec2d import waverec2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from budwood import linear_weight

INNER = "default"
"""Name of the only adapter of each of PEFT's layers."""


class Computed(nn.Module):
    """A linear with PEFT's layer of a method: PEFT's forward, or an equal one where that has a fault or costs more."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output [..., out] in the compute dtype: that of autocast if enabled, or of `x`."""
        layer, kind = self.layer, x.device.type
        if isinstance(layer, LycorisLayer):
            # PEFT's forward draws a number to skip whole modules by chance, even if they are never to be skipped.
            y = layer.base_layer(x) + layer._get_delta_activations(INNER, x)
        elif isinstance(layer, HRALinear):
            y = layer.base_layer(_reflected(x, layer.hra_u[INNER]))
        elif isinstance(layer, boft.Linear):
            y = _rotated(layer, x)
        elif (product := _product_of(layer)) is not None:
            y = layer.base_layer(x) + product(layer, x)
        else:
            y = layer(x)
        return y.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)

    def given(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output for x, whose base's product is y, which may be changed; it is computed only for others."""
        stand_in = self.layer.get_base_layer()
        stand_in.__dict__["given"] = (x, y)
        try:
            return self(x)  # type: ignore[no-any-return]
        finally:
            stand_in.__dict__["given"] = None


def _reflected(x: Tensor, vectors: Tensor) -> Tensor:
    """Return x Rᵀ for R = H₁ H₂ … Hᵣ, Hᵢ = I - 2 uᵢ uᵢᵀ, and u the normalised columns of `vectors` [in, r].

    R = I - U S⁻¹ Uᵀ with S = I / 2 + the part of Uᵀ U above its diagonal (Schreiber & Van Loan, 1989). PEFT multiplies
    the reflections as [in, in] matrices, and the result with the base's weight.
    """
    with torch.autocast(x.device.type, enabled=False):  # rounded to 16 bits, they would not be reflections
        u = vectors / vectors.norm(dim=0)
        s = (u.t() @ u).triu(1) + 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        v = torch.linalg.solve_triangular(s, u, upper=True, left=False)
    wide = x.to(u.dtype)
    return (wide - (wide @ u) @ v.t()).to(x.dtype)


def _rotated(layer: Any, x: Tensor) -> Tensor:
    """Return BOFT's output: the blocks of x rotated, the base's product, and the scales of the outputs.

    PEFT multiplies the rotations as [in, in] matrices.
    """
    rotations = layer.cayley_batch(layer.boft_R[INNER][0])
    blocks = x.to(rotations.dtype).unflatten(-1, rotations.shape[:2])
    rotated = torch.einsum("...dk,dkc->...dc", blocks, rotations).flatten(-2).to(x.dtype)
    y, bias, scale = layer.base_layer(rotated), layer.base_layer.bias, layer.boft_s[INNER].squeeze(-1)
    return y * scale if bias is None else (y - bias) * scale + bias


def _sparse_product(layer: Any, x: Tensor) -> Tensor:
    """Return x Δᵀ for SHiRA's update Δ [out, in], which PEFT adds to a copy of the base's weight."""
    weight, (rows, columns) = layer.shira_weight[INNER] * layer.scaling[INNER], layer.shira_indices[INNER].long()
    update = weight.new_zeros(layer.out_features, layer.in_features).index_put((rows, columns), weight)
    return F.linear(x.to(update.dtype), update)


def _elementwise_product(layer: Any, x: Tensor) -> Tensor:
    """Return x (W ⊙ B A)ᵀ for HiRA; the backward computes the product [out, in] again, instead of keeping it."""
    base = layer.get_base_layer().__dict__["base"]

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x.to(b.dtype), linear_weight(base, b.dtype) * (b @ a))

    y: Tensor = checkpoint(
        product, layer.hira_dropout[INNER](x), layer.hira_A[INNER], layer.hira_B[INNER], use_reentrant=False,
        preserve_rng_state=False,
    )  # fmt: skip
    return y


def _chosen_product(layer: Any, x: Tensor) -> Tensor:
    """Return x Δᵀ for Super-Tuning's sparse update, which PEFT adds to a copy of the weight, and its LoRA update."""
    values, positions = layer.supertuning_values[INNER], layer.supertuning_indices[INNER].long()
    update = values.new_zeros(layer.out_features * layer.in_features).index_put((positions,), values, True)
    y = F.linear(x.to(values.dtype), update.view(layer.out_features, layer.in_features))
    if rank := layer.supertuning_rank[INNER]:
        a, b = layer.supertuning_lora_A[INNER], layer.supertuning_lora_B[INNER]
        dropped = layer.supertuning_lora_dropout[INNER](x).to(a.weight.dtype)
        y = y + b(a(dropped)) * (layer.supertuning_lora_alpha[INNER] / rank)
    return y


def _wavelet_product(layer: Any, x: Tensor) -> Tensor:
    """Return x Δᵀ for WaveFT's update; PEFT's forward selects coefficients by a mask, so its shapes depend on values.

    The mask is always true: the rows and columns that PEFT adds around the spectrum are more than the offsets.
    """
    with torch.autocast(x.device.type, enabled=False):  # a spectrum rounded to 16 bits would be merged as another
        update = wavelet_update(layer)
    return F.linear(x.to(update.dtype), update)


def wavelet_update(layer: Any) -> Tensor:
    """Return WaveFT's update [out, in]: the inverse wavelet transform of its sparse spectrum, times the scale."""
    spectrum, indices = layer.waveft_spectrum[INNER], layer.waveft_indices[INNER]
    sizes, scaling = (layer.out_features, layer.in_features), layer.waveft_scaling[INNER]
    if not layer.waveft_use_idwt[INNER]:
        return spectrum.new_zeros(sizes).index_put((indices[0], indices[1]), spectrum * scaling)
    family = layer.waveft_wavelet_family[INNER]
    added = WAVELET_REDUCTIONS[family]
    rows, columns = (size + more + (size + more) % 2 for size, more in zip(sizes, added, strict=True))
    offsets = (rows - sizes[0]) // 2, (columns - sizes[1]) // 2
    dense = spectrum.new_zeros(rows, columns).index_put((indices[0] + offsets[0], indices[1] + offsets[1]), spectrum)
    top, bottom = dense.chunk(2)
    (a, h), (v, d) = top.chunk(2, 1), bottom.chunk(2, 1)
    update = waverec2d((a, (h, v, d)), family) * scaling  # type: ignore[arg-type]
    first = [(have - want) // 2 for have, want in zip(update.shape, sizes, strict=True)]
    return update[first[0] : first[0] + sizes[0], first[1] : first[1] + sizes[1]]


def _bank_product(layer: Any, x: Tensor) -> Tensor:
    """Return x (B A)ᵀ for VB-LoRA, whose own forward looks for infinite logits, which a plan cannot."""
    bank, topk = layer.vblora_vector_bank[INNER], layer.topk[INNER]
    logits = layer.vblora_logits_A[INNER], layer.vblora_logits_B[INNER]
    a, b = (layer._get_low_rank_matrix(part, bank, topk) for part in logits)  # [r, in / v, v], [out / v, r, v]
    dropped = layer.vblora_dropout[INNER](x.to(bank.dtype))
    return F.linear(F.linear(dropped, a.flatten(1)), b.transpose(1, 2).flatten(0, 1))


def _network_product(layer: Any, x: Tensor) -> Tensor:
    """Return x Δᵀ for PEANuT, whose update is a network's output for the weight; the backward computes it again."""
    base = layer.get_base_layer().__dict__["base"]

    def product(x: Tensor) -> Tensor:
        weight = layer.peanut_A[INNER].weight
        update: Tensor = layer._compute_delta_weight(INNER, linear_weight(base, weight.dtype))
        return F.linear(x.to(update.dtype), update)

    y: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
    return y


def _five_paths(layer: Any, x: Tensor) -> Tensor:
    """Return what GLoRA adds: x (W ⊙ A + B)ᵀ, and b ⊙ D + E + W C if the base has a bias.

    The backward computes W ⊙ A again, instead of keeping it.
    """
    stand_in, shift = layer.get_base_layer(), layer.glora_B[INNER]
    wide = x.to(next(layer.parameters()).dtype)
    low_rank = isinstance(shift, GloraLoraPath)

    def product(x: Tensor) -> Tensor:
        a, c, d, e = (part[INNER]() for part in (layer.glora_A, layer.glora_C, layer.glora_D, layer.glora_E))
        weight = linear_weight(stand_in.__dict__["base"], x.dtype)
        bias = None if stand_in.bias is None else stand_in.bias.to(x.dtype) * d + e + (weight @ c).squeeze(-1)
        return F.linear(x, weight * a if low_rank else weight * a + shift(), bias)

    y: Tensor = checkpoint(product, wide, use_reentrant=False, preserve_rng_state=False)
    return y + F.linear(F.linear(wide, shift.Xu), shift.Xd) if low_rank else y


_PRODUCTS: dict[type, Callable[[Any, Tensor], Tensor]] = {
    HiraLayer: _elementwise_product, ShiraLayer: _sparse_product, SupertuningLayer: _chosen_product,
    WaveFTLayer: _wavelet_product, VBLoRALayer: _bank_product, PeanutLayer: _network_product, GloraLayer: _five_paths,
}  # fmt: skip
"""What each method adds to the base's product."""


def _product_of(layer: Any) -> Callable[[Any, Tensor], Tensor] | None:
    return next((product for kind, product in _PRODUCTS.items() if isinstance(layer, kind)), None)
