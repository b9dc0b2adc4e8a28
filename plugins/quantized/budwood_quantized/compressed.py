"""Checkpoints of compressed-tensors (llm-compressor, vLLM), whose weights stay packed.

The library itself would unpack the whole model in the first forward, and keep it in 16 bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budwood import CorruptError, InputError
from budwood_quantized.stored import SAVED, Stored, missing, needs, wrong_setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
KNOWN = ", ".join(FORMATS)
MIXED = "mixed-precision"
"""The format of a base whose groups have their own."""


class CompressedTensors(Stored):
    """compressed-tensors with quantised weights: packed integers, fp8, and others of its formats."""

    api = 2
    takes_fused_experts = False  # transformers unpacks them as it reads them, and reads no others
    stored_names = r"\.weight_(packed|scale)$"

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "compressed-tensors"

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        groups = config.get("config_groups")
        if not groups or not isinstance(groups, dict):
            raise wrong_setting("config_groups", groups, "has to say how linears are quantised")
        schemes = list(groups.values())
        for name, scheme in groups.items():
            if not isinstance(scheme, dict):
                raise wrong_setting(f"config_groups.{name}", scheme, "has to be an object")
            if scheme.get("format") not in (None, *FORMATS):
                raise wrong_setting(f"config_groups.{name}.format", scheme["format"], f"only {KNOWN} are read")
        if config.get("format") not in (None, MIXED, *FORMATS):
            raise wrong_setting("format", config["format"], f"only {KNOWN} are read")
        inputs = any(isinstance(scheme, dict) and scheme.get("input_activations") for scheme in schemes)
        if inputs or config.get("transform_config") or config.get("kv_cache_scheme"):
            what = "inputs" if inputs else "more than weights"
            raise InputError(
                f"the base's compressed-tensors quantise {what}, which gives no exact gradient: take a base with "
                "quantised weights alone (such as W4A16), or the unquantised one with quantization nf4."
            )

    def check_saved(
        self, path: str, shape: tuple[int, int], config: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> None:
        found = {name: entry for name, entry in tensors.items() if name.startswith("weight")}
        if not found or importlib.util.find_spec("compressed_tensors") is None:  # which `check` says
            return
        from budwood_quantized.packed import planned

        entry = found.get("weight_packed") or found.get("weight") or next(iter(found.values()))
        try:
            wanted, scheme = planned(path, shape, config)
        except Exception as error:  # the library raises any exception on unexpected values
            text = " ".join(str(error).split("\n")[:3])
            raise InputError(f"the base's config.json: quantization_config: {text}: {SAVED}.") from error
        quantised = "weight" not in found or len(found) > 1
        if quantised != bool(wanted):
            what = "is" if quantised else "is not"
            raise InputError(
                f"{entry.file}: the tensor '{entry.name}' {what} quantised, and config_groups and ignore in "
                f"config.json say otherwise: {SAVED}."
            )
        stated = scheme or config.get("format")
        if wanted and stated not in (None, MIXED) and ("pack" in stated) != ("weight_packed" in found):
            raise wrong_setting("format", stated, f"'{entry.name}' is stored in another")
        for name, size in wanted.items():
            if name not in found:
                raise missing(path, name, entry)
            if found[name].shape != size and name == "weight_zero_point":
                raise InputError(
                    f"{found[name].file}: the tensor '{path}.{name}' holds packed zero points (symmetric: false in "
                    "config.json), which the installed compressed-tensors cannot load: give the unquantised base with "
                    "quantization nf4."
                )
            if found[name].shape != size:
                raise CorruptError(
                    f"{found[name].file}: the tensor '{path}.{name}' has the shape {found[name].shape}, and num_bits "
                    f"and group_size in config.json need {size}: {SAVED}."
                )

    def check(self, device: str) -> None:
        needs("compressed_tensors", "compressed-tensors", self.name)

    def stored_config(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        from budwood_quantized.packed import hide_progress

        hide_progress()
        return {**config, "dequantize": False}

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        from budwood_quantized.packed import PackedLinear

        hook = model.__dict__.pop("ct_decompress_hook", None)  # it would unpack everything in the first forward
        if hook is not None:
            hook.remove()
        for path, module in list(model.named_modules()):
            if getattr(module, "quantization_scheme", None) is not None:
                model.set_submodule(path, PackedLinear(module))

    def is_linear(self, module: nn.Module) -> bool:
        from budwood_quantized.packed import PackedLinear

        return isinstance(module, PackedLinear)

    def weight(self, module: Any) -> Tensor:
        weight: Tensor = module.stored()[0]
        return weight

    def constants(self, module: Any) -> list[Tensor]:
        constants: list[Tensor] = module.stored()[1:]
        return constants

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = module.unpacked(dtype)
        return weight
