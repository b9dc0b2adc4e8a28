"""Checkpoints of packed integers that are read here, without the library that made them: GPTQ and HQQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budwood import CorruptError, InputError
from budwood_quantized.stored import SAVED, Stored, is_size, wrong_setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

UNQUANTIZED = "give the unquantised base with quantization nf4"


class _Integers(Stored):
    """Linears with packed integers, which train as they are stored."""

    own_modules = True
    takes_fused_experts = False
    method: str
    linear: str
    """Name of the class of its modules."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.method

    def is_linear(self, module: nn.Module) -> bool:
        from budwood_quantized import integers

        return isinstance(module, getattr(integers, self.linear))

    def weight(self, module: Any) -> Tensor:
        weight: Tensor = module.get_buffer(module.packed)
        return weight

    def constants(self, module: Any) -> list[Tensor]:
        return [tensor for name, tensor in module.named_buffers() if name != module.packed]

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = module.dequantize(dtype)
        return weight


class GPTQ(_Integers):
    """GPTQ (Frantar et al., 2022) in 2, 3, 4 or 8 bits, with or without reordered inputs."""

    api = 2
    method, linear = "gptq", "GPTQLinear"
    stored_names = r"\.qweight$"

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        layout = _layout(config)
        if layout not in ("gptq", "gptq_v2"):
            raise InputError(
                f"the base is quantised with GPTQ in the format {layout!r}, and only gptq and gptq_v2 are read: "
                f"{UNQUANTIZED}."
            )
        if config.get("bits") not in (2, 3, 4, 8):
            raise InputError(
                f"the base is quantised with GPTQ in {config.get('bits')!r} bits (quantization_config in "
                f"config.json), and 2, 3, 4 and 8 are read: {UNQUANTIZED}."
            )
        size = config.get("group_size")
        if not (size in (None, -1) or is_size(size)):
            raise wrong_setting("group_size", size, "has to be a number of inputs, or -1 for one group")

    def replace(self, path: str, module: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        from budwood_quantized.integers import GPTQLinear

        inputs, outputs, bits = module.in_features, module.out_features, int(config["bits"])
        found = 32 * tensors["qweight"].shape[0] // inputs
        if config.get("dynamic") and found in (2, 3, 4, 8):
            bits = found  # modules have their own
        size = config.get("group_size", -1)
        groups = (
            tensors["scales"].shape[0]
            if config.get("dynamic") and "scales" in tensors
            else (1 if size in (-1, None) else -(-inputs // int(size)))
        )
        shapes = {"qweight": (inputs * bits // 32, outputs), "qzeros": (groups, outputs * bits // 32),
                  "scales": (groups, outputs), "g_idx": (inputs,)}  # fmt: skip
        _check_shapes(path, tensors, shapes, f"{bits} bits in groups of {size}")
        return GPTQLinear(module, tensors, bits, 1 if _layout(config) == "gptq" else 0)

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        from budwood_quantized.integers import GPTQLinear

        for path, module in model.named_modules():
            if isinstance(module, GPTQLinear) and not module.settle():
                raise CorruptError(f"the base's '{path}.g_idx' names groups that its scales do not have.")


class HQQ(_Integers):
    """HQQ (Badri & Shaji, 2023) in 2, 3, 4 or 8 bits, as transformers 4 saves it."""

    api = 2
    method, linear = "hqq", "HQQLinear"
    stored_names = r"\.W_q$"

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        for name, options in _hqq_options(config).items():
            field = ".".join(filter(None, ("quant_config", name)))
            if not isinstance(options, dict):
                raise wrong_setting(field, options, "has to be an object with weight_quant_params")
            weight = options.get("weight_quant_params")
            if not isinstance(weight, dict) or weight.get("nbits") not in (2, 3, 4, 8):
                raise InputError(
                    "the base is quantised with HQQ in a number of bits that is not read (nbits in config.json); "
                    f"2, 3, 4 and 8 are: {UNQUANTIZED}."
                )
            if options.get("scale_quant_params") or options.get("zero_quant_params") or weight.get("view_as_float"):
                raise InputError(
                    "the base is quantised with HQQ with quantised scales, or with integers stored as floats, which "
                    f"is not read: {UNQUANTIZED}."
                )
            if weight.get("channel_wise") is False:
                raise InputError(
                    f"the base is quantised with HQQ with one scale a weight, which is not read: {UNQUANTIZED}."
                )
            size, axis, field = weight.get("group_size"), weight.get("axis", 0), f"{field}.weight_quant_params"
            if not (size is None or is_size(size)):
                raise wrong_setting(f"{field}.group_size", size, "has to be a number of weights, or null")
            if axis not in (0, 1):
                raise wrong_setting(f"{field}.axis", axis, "has to be 0 or 1")

    def replace(self, path: str, module: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        from budwood_quantized.integers import IN_A_WORD, HQQLinear

        every = _hqq_options(config)
        tag = ".".join(part for part in path.split(".") if part not in ("model", "layers") and not part.isnumeric())
        if (options := every.get(tag, every.get(""))) is None:
            raise CorruptError(f"the base's linear '{path}' is packed, but quant_config in config.json has no '{tag}'.")
        options = options["weight_quant_params"]
        inputs, outputs, bits, axis = module.in_features, module.out_features, options["nbits"], options.get("axis", 0)
        size = options.get("group_size") or (inputs if axis else outputs)
        shape = (inputs * outputs // size, size) if axis else (size, inputs * outputs // size)
        constants = (shape[0], 1) if axis else (1, shape[1])
        shapes = {"W_q": (-(-shape[0] // IN_A_WORD[bits]), shape[1]), "scale": constants, "zero": constants}
        _check_shapes(path, tensors, shapes, f"{bits} bits in groups of {size} along axis {axis}")
        return HQQLinear(module, tensors, bits, axis, shape)

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        from budwood_quantized.integers import HQQLinear

        for path, module in model.named_modules():
            if isinstance(module, HQQLinear) and (wrong := module.settle()):
                raise InputError(f"the base's '{path}.{wrong}' contradicts quant_config in config.json: {SAVED}.")


def _check_shapes(path: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], why: str) -> None:
    """Check the tensors of a linear before they are read.

    Raises:
        CorruptError: one is missing.
        InputError: its shape is another.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise CorruptError(f"the base's linear '{path}' has no tensor '{name}', which its config.json needs.")
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"the base's '{path}.{name}' has the shape {list(tensors[name].shape)}, but config.json ({why}) needs "
                f"{list(shape)}: {SAVED}."
            )


def _layout(config: Mapping[str, Any]) -> Any:
    """Return the format of a GPTQ checkpoint, which older tools do not name."""
    return config.get("checkpoint_format") or config.get("format") or "gptq"


def _hqq_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of HQQ for linears by their names without model and layer; "" stands for every linear."""
    options = config.get("quant_config")
    if not isinstance(options, dict):
        return {"": {}}
    return {"": options} if "weight_quant_params" in options else {k: v for k, v in options.items() if v}
