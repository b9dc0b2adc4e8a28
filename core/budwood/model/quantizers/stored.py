"""Loads checkpoints into a quantiser's own modules, in place of the linears that the checkpoint has packed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from budwood.contract.calls import attribute_errors
from budwood.errors import InputError
from budwood.model.experts import fused_experts
from budwood.model.quantizers.experts import ExpertLinear
from budwood.model.quantizers.protocol import Quantizer, Unquantized
from budwood.model.stated_sizes import ONE_EXPERT
from budwood.untrusted.formats import TensorInfo
from budwood.untrusted.redaction import shorten

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's dtypes by their names in safetensors."""
METHOD = "budwood"
"""The name under which transformers knows the quantisers of this module."""


def replace_linears(
    model: Any, quantizer: Quantizer, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> int:
    """Replace the linears of a model whose weights a checkpoint has packed; returns their number.

    Args:
        model: as for `packed_linears`; modified in place.
    """
    packed = packed_linears(model, quantizer, config, tensors)
    for path, module in packed.items():
        model.set_submodule(path, module)
    return len(packed)


def packed_linears(
    model: Any, quantizer: Quantizer, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, nn.Module]:
    """Return the quantiser's modules for the linears whose weights a checkpoint has packed, by their paths.

    Args:
        model: one of transformers' models, on the meta device.
        config: the checkpoint's `quantization_config`.
        tensors: the tensors of the checkpoint.

    Raises:
        InputError: a packed tensor belongs to the head, or to no linear.
        BudwoodError: the quantiser refuses a linear.
    """
    found: dict[str, nn.Module] = {}
    modules, body = dict(model.named_modules()), f"{model.base_model_prefix}."
    head = model.get_output_embeddings()
    paths = dict.fromkeys(name[: m.start()] for name in tensors if (m := re.search(quantizer.stored_names, name)))
    under = _under(tensors)
    for stored in paths:
        path = next((name for name in possible_names(stored, body) if name in modules), stored)
        module = modules.get(path)
        if module is None or not Unquantized().is_linear(module):
            raise InputError(
                f"the base's packed tensors of '{stored}' belong to no linear of {type(model).__name__} in "
                "transformers: give the unquantised base with quantization nf4."
            )
        if module is head:
            raise InputError(
                f"the base's head '{stored}' is quantised too, and a head is computed unquantised: take a checkpoint "
                "whose head is not, or the unquantised base with quantization nf4."
            )
        own = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in under[stored].items()
        }
        with attribute_errors(quantizer, "replace"):
            found[path] = quantizer.replace(stored, module, config, own)
    return found


def check_linears(
    model: Any, quantizer: Quantizer, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    """Check each linear of a checkpoint that transformers loads for a quantiser; arguments as for `packed_linears`.

    Raises:
        InputError: the configuration's `llm_int8_skip_modules` are no names or regular expressions; the experts of a
            mixture are packed, which only MXFP4 reads.
        BudwoodError: see `Quantizer.check_saved`.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped, kept = config.get("llm_int8_skip_modules"), getattr(model, "_keep_in_fp32_modules", None)
    if not (skipped is None or (isinstance(skipped, list) and all(map(_is_pattern, skipped)))):
        raise InputError(
            f"quantization_config in config.json: llm_int8_skip_modules: {shorten(str(skipped))} is no list of names."
        )
    left = HfQuantizer.get_modules_to_not_convert(model, skipped, kept)
    body, head = f"{model.base_model_prefix}.", model.get_output_embeddings()
    under = _under(tensors)
    _check_packed_experts(model, quantizer, body, under)
    _check_config(config)
    for path, module in model.named_modules():
        if module is head or not Unquantized().is_linear(module) or not should_convert_module(path, left):
            continue
        stored = next((name for name in possible_names(path, body) if name in under), None)
        if stored is not None:
            with attribute_errors(quantizer, "check_saved"):
                quantizer.check_saved(stored, Unquantized().shape(module), config, under[stored])
    _check_experts(model, quantizer, config, body, under)


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that transformers cannot read."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(config.get("quant_method")))
    if kind is None:
        return
    try:
        kind.from_dict(dict(config))
    except ImportError:  # which `Quantizer.check` says
        return
    except Exception as error:  # a config class may raise any exception on unexpected values
        raise InputError(
            f"quantization_config in config.json: {type(error).__name__}: {shorten(str(error), 200)}: take the "
            "config.json that was saved with these weights."
        ) from error


def _check_packed_experts(
    model: nn.Module, quantizer: Quantizer, body: str, under: Mapping[str, Mapping[str, TensorInfo]]
) -> None:
    """Refuse packed experts unless the quantiser keeps them as they are stored, or says that it dequantises."""
    keeps = quantizer.stored_only and type(quantizer).pack_experts is not Quantizer.pack_experts
    if keeps or quantizer.dequantizes:
        return
    for path, _, _ in fused_experts(model):
        for name, entry in (pair for stored in possible_names(path, body) for pair in under.get(stored, {}).items()):
            if re.search(quantizer.stored_names or "$^", f".{name}"):
                raise InputError(
                    f"{entry.file}: the tensor '{entry.name}' of an expert is packed, and {quantizer} reads no packed "
                    "experts: give the unquantised base with quantization nf4."
                )


def _check_experts(
    model: nn.Module, quantizer: Quantizer, config: Mapping[str, Any], body: str,
    under: Mapping[str, Mapping[str, TensorInfo]],
) -> None:  # fmt: skip
    """Check the experts of a checkpoint, which are stored one by one like linears, or all in one tensor."""
    for stored, tensors in under.items() if quantizer.dequantizes else ():
        if ONE_EXPERT.fullmatch(stored) and "weight" in tensors and len(tensors["weight"].shape) == 2:
            with attribute_errors(quantizer, "check_saved"):
                quantizer.check_saved(stored, tensors["weight"].shape[:2], config, tensors)
    for path, module in model.named_modules():
        if not isinstance(module, ExpertLinear):
            continue
        parent, _, leaf = path.rpartition(".")
        for stored in filter(under.__contains__, possible_names(parent, body)):
            tensors = {name.removeprefix(leaf): entry for name, entry in under[stored].items() if name.startswith(leaf)}
            with attribute_errors(quantizer, "check_saved_experts"):
                shape = (module.experts, module.out_features, module.in_features)
                quantizer.check_saved_experts(f"{stored}.{leaf}", shape, config, tensors)
            break


def _under(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors below each module or part of a checkpoint, by their names in it."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, entry in tensors.items():
        at = name.find(".")
        while at >= 0:
            found.setdefault(name[:at], {})[name[at + 1 :]] = entry
            at = name.find(".", at + 1)
    return found


def possible_names(path: str, body: str) -> tuple[str, str, str]:
    """Return the names that a module or tensor may have in a checkpoint: of the model, or of its body."""
    return path, body + path, path.removeprefix(body)


def _is_pattern(name: Any) -> bool:
    """Return whether transformers can compare names of modules with this one, which may be a regular expression."""
    with contextlib.suppress(re.error, TypeError):
        return re.compile(name) is not None
    return False


def loading_config(quantizer: Quantizer, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Any:
    """Return the `quantization_config` with which transformers loads a checkpoint into the quantiser's modules."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        def get(self, key: str, default: Any = None) -> Any:  # transformers reads it like a dict
            return getattr(self, key, default)

    class Loader(HfQuantizer):
        is_trainable = True

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            replace_linears(model, quantizer, config, tensors)

    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Config
    AUTO_QUANTIZER_MAPPING[METHOD] = Loader
    return Config(METHOD)  # type: ignore[arg-type]
