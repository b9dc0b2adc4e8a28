"""Fused experts of a mixture: the linears of all experts in one tensor, quantised expert by expert."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from budwood.model.ops.experts import Routing


class ExpertLinear(nn.Module):
    """One projection of all experts, without a bias: y = x W_eᵀ for the rows of expert e.

    A subclass stores the weights and implements `dequantize`.

    Attributes:
        experts, out_features, in_features: E experts, each with a weight [out, in].
    """

    quantized = True

    def __init__(self, experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.experts, self.out_features, self.in_features = experts, out_features, in_features

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return [S, out] for rows x [S, in], sorted by expert."""
        from budwood.model.ops.experts import expert_linear

        return expert_linear(x, self, routing)

    @property
    def numel(self) -> int:
        """Return the number of weights."""
        return self.experts * self.out_features * self.in_features

    @property
    def stored(self) -> list[Tensor]:
        """Return the tensors that hold the weights."""
        return [*self.parameters(recurse=False), *self.buffers(recurse=False)]

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return the weights [stop - start, out, in] of some experts in `dtype`; the caller may not modify them."""
        raise NotImplementedError


class DenseExperts(ExpertLinear):
    """Experts in the compute dtype, in the parameter of transformers: [E, out, in], or [E, in, out] if transposed.

    In a state dict, the parameter keeps the name that it has in transformers: the path of this module.
    """

    quantized = False

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        experts, first, second = weight.shape
        super().__init__(experts, *((second, first) if transposed else (first, second)))
        self.weight, self.transposed = weight, transposed

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        weight = self.weight[start:stop].to(dtype)
        return weight.transpose(1, 2) if self.transposed else weight

    def add(self, update: Tensor) -> None:
        """Add [E, out, in] permanently to the weights."""
        with torch.no_grad():
            self.weight.add_((update.transpose(1, 2) if self.transposed else update).to(self.weight.dtype))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix[:-1] or "weight"] = self.weight if keep_vars else self.weight.detach()


class FourBitExperts(ExpertLinear):
    """Experts in bitsandbytes' 4-bit formats, each quantised by itself as one linear would be.

    Attributes:
        codes: [E, ceil(out · in / 2)] uint8, two weights per byte.
        scales: the largest absolute value of each block of 64: [E, blocks] fp32; with double quantisation uint8 codes.
        coarse: with double quantisation the scale of each 256 scales, [E, ceil(blocks / 256)] fp32; else empty.
        offset: [E] fp32, the mean that was subtracted from the scales; likewise.
        table: [256] fp32, values of the scales' codes; likewise.
    """

    codes: Tensor
    scales: Tensor
    coarse: Tensor
    offset: Tensor
    table: Tensor

    def __init__(self, shape: tuple[int, int, int], kind: str, tensors: dict[str, Tensor]) -> None:
        super().__init__(*shape)
        self.kind = kind
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def pack(cls, weight: Tensor, kind: str, double: bool) -> FourBitExperts:
        """Quantise [E, out, in] expert by expert."""
        from bitsandbytes import functional as bnb

        experts, outputs, inputs = weight.shape
        made = cls.planned((experts, outputs, inputs), kind, double, weight.device)
        for expert in range(experts):
            codes, state = bnb.quantize_4bit(
                weight[expert].contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type=kind
            )
            made.codes[expert] = codes.view(-1)
            made.scales[expert] = state.absmax
            if double:
                made.coarse[expert], made.offset[expert] = state.state2.absmax, state.offset
                made.table.copy_(state.state2.code)
        return made

    @classmethod
    def planned(cls, shape: tuple[int, int, int], kind: str, double: bool, device: Any = "cpu") -> FourBitExperts:
        """Return experts with uninitialised weights."""
        experts, outputs, inputs = shape
        blocks = -(-outputs * inputs // BLOCK)
        coarse = -(-blocks // NESTED_BLOCK) if double else 0

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=device)

        return cls(shape, kind, {
            "codes": empty(experts, (outputs * inputs + 1) // 2, dtype=torch.uint8),
            "scales": empty(experts, blocks, dtype=torch.uint8 if double else torch.float32),
            "coarse": empty(experts, coarse),
            "offset": empty(experts if double else 0),
            "table": empty(256 if double else 0),
        })  # fmt: skip

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        count, outputs, inputs = stop - start, self.out_features, self.in_features
        scales = self._scales(start, stop)
        if outputs * inputs % BLOCK == 0:
            return self._dequantize(self.codes[start:stop], scales, (count, outputs, inputs), dtype)
        shape = (outputs, inputs)  # one by one, as a block would reach into the next expert
        return torch.stack([self._dequantize(self.codes[start + i], scales[i], shape, dtype) for i in range(count)])

    def _dequantize(self, codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # bitsandbytes' CPU kernel takes the wrong scales where a row ends inside a block, so those are one long row.
        flat = shape if shape[-1] % BLOCK == 0 else (math.prod(shape),)
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes.reshape(-1, 1), scales.reshape(-1), BLOCK, self.kind, flat, dtype
        )
        return weight.view(shape)

    def _scales(self, start: int, stop: int) -> Tensor:
        """Return the scales [n, blocks] fp32."""
        scales = self.scales[start:stop]
        if scales.is_floating_point():
            return scales
        values = self.table.index_select(0, scales.reshape(-1).int()).view(scales.shape)
        coarse = self.coarse[start:stop].repeat_interleave(NESTED_BLOCK, 1)[:, : scales.shape[1]]
        return values * coarse + self.offset[start:stop, None]


class Int8Experts(ExpertLinear):
    """Experts in 8 bits with one scale per row; unlike bitsandbytes' linears, their inputs are not quantised.

    Attributes:
        codes: [E, out, in] int8.
        scales: [E, out] fp32; a weight is its code times the scale.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(*codes.shape)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @classmethod
    def pack(cls, weight: Tensor) -> Int8Experts:
        """Quantise [E, out, in] expert by expert."""
        made = cls.planned((weight.shape[0], weight.shape[1], weight.shape[2]), weight.device)
        for expert, matrix in enumerate(weight):
            values = matrix.float()
            scales = values.abs().amax(1) / 127.0
            made.codes[expert] = torch.round(values / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
            made.scales[expert] = scales
        return made

    @classmethod
    def planned(cls, shape: tuple[int, int, int], device: Any = "cpu") -> Int8Experts:
        """Return experts with uninitialised weights."""
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(shape[:2], dtype=torch.float32, device=device))

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.codes[start:stop].to(dtype).mul_(self.scales[start:stop, :, None])


BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one if they are quantised too: bitsandbytes' defaults."""


def experts_of(module: nn.Module) -> int:
    """Return the number of experts whose linears a module stores, also within PEFT's layers; 0: none."""
    inner: Any = module
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner.experts if isinstance(inner, ExpertLinear) else 0


def quantized_experts(model: nn.Module) -> list[ExpertLinear]:
    """Return the fused expert projections of a model that are quantised."""
    return [module for module in model.modules() if isinstance(module, ExpertLinear) and module.quantized]
