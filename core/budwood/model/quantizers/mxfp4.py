"""Experts in MXFP4 (OCP Microscaling Formats, version 1.0): four bits, and a power of two for each 32 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from budwood.model.quantizers.experts import ExpertLinear

BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a code stand for; the fourth is the sign."""


class MXFP4Experts(ExpertLinear):
    """The experts of a checkpoint in MXFP4, such as gpt-oss, with exactly its weights.

    Attributes:
        codes: [E, out, in / 2] uint8, two weights per byte, the first in the lower half.
        exponents: [E, out, in / 32] int8; a weight is the value of its code times two to this power.
    """

    codes: Tensor
    exponents: Tensor

    def __init__(self, codes: Tensor, exponents: Tensor) -> None:
        experts, outputs, half = codes.shape
        super().__init__(experts, outputs, 2 * half)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("exponents", exponents, persistent=False)

    @classmethod
    def planned(cls, shape: tuple[int, int, int], device: Any = "cpu") -> MXFP4Experts:
        """Return experts with uninitialised weights."""
        experts, outputs, inputs = shape
        codes = torch.empty(experts, outputs, inputs // 2, dtype=torch.uint8, device=device)
        return cls(codes, torch.empty(experts, outputs, inputs // BLOCK, dtype=torch.int8, device=device))

    @classmethod
    def pack(cls, weight: Tensor) -> MXFP4Experts:
        """Encode weights [E, out, in] that were dequantised from MXFP4, without loss.

        Raises:
            ValueError: a weight is not one of the format's.
        """
        made = cls.planned((weight.shape[0], weight.shape[1], weight.shape[2]), weight.device)
        bounds = torch.tensor(MAGNITUDES, device=weight.device)
        for expert, matrix in enumerate(weight):
            blocks = matrix.float().view(len(matrix), -1, BLOCK)
            largest = blocks.abs().amax(2)
            # The largest is at most 6, and at least 4 times the power of two, unless the block is zero.
            exponents = torch.where(largest > 0, torch.frexp(largest).exponent - 3, 0)
            scaled = torch.ldexp(blocks, -exponents.unsqueeze(2))
            codes = torch.bucketize(scaled.abs(), bounds) | (torch.signbit(scaled).int() << 3)
            pairs = codes.view(len(matrix), -1, 2).to(torch.uint8)
            made.codes[expert] = pairs[..., 0] | (pairs[..., 1] << 4)
            made.exponents[expert] = exponents
            if not torch.equal(made.dequantize(expert, expert + 1, torch.float32)[0], matrix.float()):
                raise ValueError(f"expert {expert} has weights that MXFP4 does not have")
        return made

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        codes = self.codes[start:stop]
        table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=dtype, device=codes.device)
        index = torch.stack([codes & 15, codes >> 4], 3).view(-1).int()
        powers = torch.exp2(self.exponents[start:stop].float()).to(dtype)
        values = table.index_select(0, index).view(*powers.shape, BLOCK)
        return (values * powers.unsqueeze(3)).view(stop - start, self.out_features, self.in_features)
