"""Checks the tensors of a checkpoint that bitsandbytes quantised against its configuration, before weights are read.

transformers loads such a checkpoint without looking: a linear whose scales are too few computes with whatever lies
behind them in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from budwood.errors import CorruptError, InputError
from budwood.untrusted.formats import TensorInfo

STATE = "weight.quant_state.bitsandbytes__"
"""Start of the name of the tensor that describes a 4-bit weight, as JSON in bytes; its kind follows."""
MAX_STATE = 10_000
FLOATS = ("F64", "F32", "F16", "BF16")


def check_four_bit(path: str, shape: tuple[int, int], kind: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Check a 4-bit linear; see `Quantizer.check_saved`.

    Args:
        kind: nf4 or fp4, by the configuration.
    """
    weight = tensors.get("weight")
    if weight is None:
        return  # the model then lacks it, which loading reports
    state = next((name for name in tensors if name.startswith(STATE)), None)
    if state is None:
        raise _unquantised(path, weight) if weight.dtype in FLOATS else _missing(path, STATE + kind, weight)
    for name in ("weight.absmax", "weight.quant_map"):
        if name not in tensors:
            raise _missing(path, name, weight)
    if state != STATE + kind:
        raise InputError(
            f"{weight.file}: '{path}.weight' is quantised in {state.removeprefix(STATE)}, but bnb_4bit_quant_type in "
            f"config.json is {kind}: take the config.json that was saved with these weights."
        )
    facts = _read_state(tensors[state])
    if tuple(facts["shape"]) != shape:
        raise CorruptError(
            f"{weight.file}: '{path}.weight' has the shape {tuple(facts['shape'])}, and config.json gives {shape}: "
            "take the files that belong together."
        )
    count = shape[0] * shape[1]
    blocks = -(-count // facts["blocksize"])
    wanted = {"weight": ((count + 1) // 2, "bytes"), "weight.absmax": (blocks, "scales"), "weight.quant_map": (16, "")}
    if "nested_blocksize" in facts:
        for name in ("weight.nested_absmax", "weight.nested_quant_map"):
            if name not in tensors:
                raise _missing(path, name, weight)
        wanted["weight.nested_absmax"] = (-(-blocks // facts["nested_blocksize"]), "scales of scales")
        wanted["weight.nested_quant_map"] = (256, "")
    for name, (size, unit) in wanted.items():
        entry = tensors[name]
        found = entry.bytes if unit == "bytes" else math.prod(entry.shape)
        if found != size:
            raise CorruptError(
                f"{entry.file}: the tensor '{path}.{name}' has {found:,} {unit or 'values'}, and a weight of "
                f"{shape[0]:,} × {shape[1]:,} needs {size:,}: take complete files."
            )


def check_eight_bit(path: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> None:
    """Check an 8-bit linear; see `Quantizer.check_saved`."""
    weight = tensors.get("weight")
    if weight is None:
        return
    if "SCB" not in tensors:
        raise _unquantised(path, weight) if weight.dtype in FLOATS else _missing(path, "SCB", weight)
    for name, wanted in (("weight", shape), ("SCB", shape[:1])):
        if tensors[name].shape != wanted:
            raise CorruptError(
                f"{weight.file}: the tensor '{path}.{name}' has the shape {tensors[name].shape}, and config.json gives "
                f"{wanted}: take the files that belong together."
            )


def _unquantised(path: str, weight: TensorInfo) -> InputError:
    return InputError(
        f"{weight.file}: the tensor '{path}.weight' is not quantised, but quantization_config in config.json says so: "
        "take the files that belong together, or name the module in its llm_int8_skip_modules."
    )


def _missing(path: str, name: str, weight: TensorInfo) -> CorruptError:
    return CorruptError(
        f"{weight.file}: the tensor '{path}.{name}' is missing, without which '{path}.weight' cannot be dequantised: "
        "take complete files."
    )


def _read_state(entry: TensorInfo) -> dict[str, Any]:
    """Return the description of a 4-bit weight: its shape, `blocksize`, and `nested_blocksize` if there is one."""
    facts: Any = None
    if entry.bytes <= MAX_STATE:
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            with contextlib.suppress(ValueError, RecursionError):
                facts = json.loads(file.read(entry.bytes))
    sizes = [facts.get("blocksize"), facts.get("nested_blocksize", 1)] if isinstance(facts, dict) else [None]
    lengths = facts.get("shape") if isinstance(facts, dict) else None
    valid = isinstance(lengths, list) and all(type(n) is int and n > 0 for n in (*sizes, *lengths))
    if not valid:
        raise CorruptError(f"{entry.file}: the tensor '{entry.name}' does not describe a weight: take complete files.")
    result: dict[str, Any] = facts
    return result
