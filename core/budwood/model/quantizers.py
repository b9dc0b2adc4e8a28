"""Quantisers of a base's linears, and the guard against bitsandbytes' repacking of 4-bit weights.

A quantiser registers in the entry point group `budwood.quantizers`, under the name that recipes use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from budwood.contract.strategy import Plugin
from budwood.errors import ResourceError
from budwood.model.quiet import hide_hub_kernels

if TYPE_CHECKING:
    import torch
    from torch import nn


class Quantizer(Plugin):
    """How a base's linears are stored. This one leaves them as they are."""

    group = "budwood.quantizers"
    api = 2
    takes_fused_experts: bool = True
    """False: three-dimensional tensors of experts would stay in 16 bit, so such a base is refused."""

    def check(self, device: str) -> None:
        """Refuse a machine that cannot do it; `device` is a torch device such as "cuda:0".

        Raises:
            ResourceError: a library is missing, or does not support the device.
        """

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        """Return transformers' `quantization_config`, or None.

        Args:
            dtype: what matrix products are computed in.
            double_quantization: quantise the quantisation constants too, where the method can.
            skip: names of modules that stay as they are (heads).
        """
        return None


class Unquantized(Quantizer):
    """Weights in the compute dtype."""


class _BitsAndBytes(Quantizer):
    takes_fused_experts = False

    def check(self, device: str) -> None:
        hide_hub_kernels()
        try:
            import bitsandbytes
        except Exception as error:  # a broken native library raises whatever the linker does
            raise ResourceError(
                f"quantization needs bitsandbytes, which does not import here ({error}): "
                "`pip install bitsandbytes`, or use `quantization: none`."
            ) from error
        kind = device.split(":")[0]
        if kind not in bitsandbytes.supported_torch_devices:
            known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
            raise ResourceError(
                f"bitsandbytes {bitsandbytes.__version__} does not quantise on '{kind}' (it does on {known}): "
                "use `quantization: none`, or another device."
            )


class Int8(_BitsAndBytes):
    """8 bits, one scale a row (LLM.int8(), Dettmers et al., 2022)."""

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)


class _FourBit(_BitsAndBytes):
    kind: str

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double_quantization,
            llm_int8_skip_modules=skip,
        )


class NF4(_FourBit):
    """4 bits, quantiles of a normal distribution, one scale for 64 weights (QLoRA, Dettmers et al., 2023)."""

    kind = "nf4"


class FP4(_FourBit):
    """4-bit floating point, one scale for 64 weights."""

    kind = "fp4"


def guard_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of `model` in place.

    On a CPU with AVX512-BF16 `Linear4bit` does so in the first forward in evaluation mode without a gradient; all that
    dequantises the weight afterwards (backward, merge) gets zeros or garbage without an error. bitsandbytes has no
    switch; the layers ask the attribute that is set off here, and copies of a layer keep it.
    """
    for layer in _four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def assert_not_packed(model: nn.Module) -> None:
    """Check that no 4-bit weight of `model` has been repacked; cheap, for use before training and merging.

    Raises:
        RuntimeError: a weight has been repacked, so that gradients and merged weights would be garbage.
    """
    for layer in _four_bit_layers(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError("a 4-bit weight has been repacked for inference: its gradients would be garbage")


def _four_bit_layers(model: nn.Module) -> list[Any]:
    import sys

    bitsandbytes = sys.modules.get("bitsandbytes")  # not imported: nothing is quantised
    if bitsandbytes is None:
        return []
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
