"""Formats that transformers dequantises as it reads them, since their kernels need one kind of GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budwood import CorruptError
from budwood_quantized.stored import Stored, missing, sizes_in, wrong_setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor


BLOCK = 32
"""Weights that share an exponent in MXFP4."""


class _Dequantized(Stored):
    method: str

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.method

    def stored_config(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        return {**config, "dequantize": True}


class MXFP4(_Dequantized):
    """Four bits with a shared exponent for 32 weights, as the experts of gpt-oss are stored (OCP MX), kept exactly."""

    api = 2
    method = "mxfp4"
    stored_names = r"_blocks$"
    takes_fused_experts = False

    def check_saved_experts(
        self, path: str, shape: tuple[int, int, int], config: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> None:
        experts, outputs, inputs = shape
        blocks = (experts, outputs, inputs // BLOCK)
        wanted = {"_blocks": (*blocks, BLOCK // 2), "_scales": blocks}
        present = [tensors[name] for name in wanted if name in tensors]
        for name, size in wanted.items() if present else ():
            if name not in tensors:
                raise CorruptError(
                    f"{present[0].file}: the tensor '{path}{name}' is missing, without which its experts cannot be "
                    "read: take complete files."
                )
            if tensors[name].shape != size:
                raise CorruptError(
                    f"{tensors[name].file}: the tensor '{path}{name}' has the shape {tensors[name].shape}, and "
                    f"config.json gives {size}: take the files that belong together."
                )

    def pack_experts(self, weight: Tensor, double_quantization: bool) -> Any:
        from budwood import MXFP4Experts

        try:
            return MXFP4Experts.pack(weight)
        except ValueError as error:
            raise CorruptError(
                f"{error} (a scale of 255 stands for no number): take complete files that belong together."
            ) from error

    def planned_experts(self, shape: tuple[int, int, int], double_quantization: bool) -> Any:
        from budwood import MXFP4Experts

        return MXFP4Experts.planned(shape)


class FineGrainedFP8(_Dequantized):
    """fp8 with a scale for each block of a weight, as DeepSeek-V3 is stored."""

    api = 2
    dequantizes = True
    method = "fp8"
    stored_names = r"\.weight_scale(_inv)?$"

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        block = config.get("weight_block_size")
        if block is not None and len(sizes_in(block)) != 2:
            raise wrong_setting("weight_block_size", block, "has to be two numbers: rows and columns of a block")

    def check_saved(
        self, path: str, shape: tuple[int, int], config: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> None:
        weight = tensors.get("weight")
        if weight is None or not weight.dtype.startswith("F8"):
            return
        scale = next((tensors[name] for name in ("weight_scale_inv", "weight_scale") if name in tensors), None)
        if scale is None:
            raise missing(path, "weight_scale_inv", weight)
        sides = sizes_in(config.get("weight_block_size"))
        wanted = tuple(-(-size // side) for size, side in zip(shape, sides, strict=False)) if sides else scale.shape
        if scale.shape != wanted:  # one that is too small would be repeated
            raise CorruptError(
                f"{scale.file}: the scales of '{path}.weight' have the shape {scale.shape}, and blocks of "
                f"{sides} in {shape} need {wanted}: take the files that belong together."
            )
