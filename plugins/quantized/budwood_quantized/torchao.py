"""Checkpoints of torchao: linears whose weight is a tensor of its own class."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import CorruptError, InputError
from budwood_quantized.stored import Stored, missing, needs, sizes_in, wrong_setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


PARTS = "_weight_"
"""Start of the names of the tensors that a weight consists of."""
UNPACKED = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
"""Classes that store a weight in its own shape, and a scale for each block."""


class TorchAO(Stored):
    """torchao's weight-only formats: int8, fp8, and int1 to int8 in groups."""

    api = 2
    stored_names = r"_qdata$"
    needs_files = True  # how each tensor is made is in the metadata of its file

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "torchao"

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        given = config.get("quant_type")
        kind = given.get("default") if isinstance(given, dict) else None
        if not (isinstance(kind, dict) and str(kind.get("_type", "")).endswith("Config")):
            raise wrong_setting("quant_type.default", kind, "has to be torchao's description of a configuration")
        for kind in sorted(_kinds(given)):
            if "Activation" in kind:
                raise InputError(
                    f"the base is quantised with torchao's {kind}, which also quantises inputs and so gives no exact "
                    "gradient: take a base with weights alone (…WeightOnlyConfig), or the unquantised one."
                )
            if kind.startswith("Int4WeightOnly") and device is not None and device.startswith("cpu"):
                raise InputError(
                    f"the base is quantised with torchao's {kind}, which does not support a CPU: take one of "
                    "IntxWeightOnlyConfig, or the unquantised base with quantization nf4."
                )

    def check_saved(
        self, path: str, shape: tuple[int, int], config: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> None:
        entry = next((entry for name, entry in tensors.items() if name.startswith(PARTS)), None)
        if entry is None:
            return
        status = entry.file.stat()
        described = _metadata(entry.file, status.st_size, status.st_mtime_ns).get(f"{path}.weight", "{}")
        try:
            facts = json.loads(described)
            names, block, kind = facts.get("_tensor_data_names", ()), facts.get("_data", {}), facts.get("_type")
            block = sizes_in(block.get("block_size"))
        except (ValueError, AttributeError, RecursionError):
            raise CorruptError(
                f"{entry.file}: its metadata do not describe '{path}.weight': take complete files."
            ) from None
        for part in names:
            if f"{PARTS}{part}" not in tensors:
                raise missing(path, f"{PARTS}{part}", entry)
        if kind not in UNPACKED or not block:
            return
        blocks = tuple(size // side for size, side in zip(shape, block, strict=False))
        for part, wanted in (("qdata", shape), ("scale", blocks), ("zero_point", blocks)):
            found = tensors.get(f"{PARTS}{part}")
            if found is not None and math.prod(found.shape) != math.prod(wanted):
                raise CorruptError(
                    f"{found.file}: the tensor '{path}.{PARTS}{part}' has the shape {found.shape}, and blocks of "
                    f"{block} in {shape} need {wanted}: take the files that belong together."
                )

    def check(self, device: str) -> None:
        needs("torchao", "torchao", self.name)

    def is_linear(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.Linear) and type(module.weight.data).__module__.startswith("torchao.")

    def shape(self, module: Any) -> tuple[int, int]:
        outputs, inputs = module.weight.shape
        return outputs, inputs

    def bytes(self, module: Any) -> int:
        names, _ = module.weight.data.__tensor_flatten__()
        return sum(getattr(module.weight.data, name).nbytes for name in names)

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = module.weight.data.dequantize().to(dtype)
        return weight


@lru_cache(maxsize=64)
def _metadata(file: Path, size: int, changed: int) -> dict[str, str]:
    """Return the metadata of a safetensors file, in which torchao describes each weight; `changed` in nanoseconds."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def _kinds(value: Any) -> set[str]:
    """Return the names of the classes in torchao's JSON of a quantisation: `_type` with `_data`, nested."""
    if isinstance(value, list):
        return set().union(*map(_kinds, value))
    if not isinstance(value, dict):
        return {value} if isinstance(value, str) and value.endswith("Config") else set()
    own = {str(value["_type"])} if str(value.get("_type", "")).endswith("Config") else set()
    return own.union(*map(_kinds, value.values()))
