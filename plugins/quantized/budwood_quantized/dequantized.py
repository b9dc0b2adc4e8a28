"""Formats whose matrix products need kernels of one kind of GPU: their weights are dequantised as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budwood_quantized.stored import Stored

if TYPE_CHECKING:
    import torch


class _Dequantized(Stored):
    dequantizes = True
    method: str

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.method

    def stored_config(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        return {**config, "dequantize": True}


class MXFP4(_Dequantized):
    """Four bits with a shared exponent for 32 weights, as the experts of gpt-oss are stored (OCP MX)."""

    api = 2
    method = "mxfp4"
    stored_names = r"_blocks$"


class FineGrainedFP8(_Dequantized):
    """fp8 with a scale for each block of a weight, as DeepSeek-V3 is stored."""

    api = 2
    method = "fp8"
    stored_names = r"\.weight_scale(_inv)?$"
