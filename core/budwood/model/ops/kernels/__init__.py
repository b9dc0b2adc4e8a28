"""Kernels of the ops in this package: which are used, and their launches. For CUDA in Triton, for CPUs compiled C++.

An op asks for an `implementation`, and otherwise computes with torch. On each device and dtype, a kernel is compared
once with torch's own computation; one that fails or differs is not used, and `problems` says why.
`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels on a CPU, for tests: in fp32 and fp16 only, since
Triton's interpreter computes wrongly in bf16. On a CPU without that, torch computes, unless `compile_ops` was called.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from budwood.errors import describe, is_out_of_memory
from budwood.model.device import device_type, isolated

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

LEAST = 1 << 15
"""Elements from which compiled ops compute; below, as in a generation's steps, a call takes longer than the work."""

problems: list[str] = []
"""One line for each kernel that is not used although the device could run it."""
_compiles = False
_has_compiled = False


def prepare(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Compile and check all kernels for a CUDA device, and return a line for each that is not used there."""
    if device.type == "cuda" and dtype in DTYPES and importlib.util.find_spec("triton") is not None:
        from budwood.model.ops.kernels.checks import CHECKS

        if device.index is None:  # tensors have one, and a check is remembered under it
            device = torch.device("cuda", torch.cuda.current_device())
        for name in CHECKS:
            _passes(name, device, dtype)
    return list(problems)


def compile_ops(on: bool) -> None:
    """Let CPUs compute large ops with compiled C++ from now on in this process, or no longer."""
    global _compiles, _has_compiled
    _compiles, _has_compiled = on, False


def has_compiled() -> bool:
    """Return whether compiled code has computed an op since `compile_ops`, outside of plans and checks."""
    return _has_compiled


def prepare_compiled(dtype: torch.dtype) -> list[str]:
    """Compile and check the ops of `compile_ops` for a CPU, and return a line for each that fails."""
    from budwood.model.ops.kernels.compiled import NAMES

    before = len(problems)
    for name in NAMES:
        _passes(name, torch.device("cpu"), dtype)
    return problems[before:]


def implementation(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Any:
    """Return the module whose functions compute the op, or None if torch is to compute it.

    The module is `launch`, `compiled`, or `planned`, which allocates the same results on the fake tensors of a plan.

    Args:
        name: a key of `checks.CHECKS`.
        tensor: an operand, which determines the device.
        dtype: that of the computation; by default that of the operand.
    """
    global _has_compiled
    kind, dtype = device_type(tensor), dtype or tensor.dtype
    compiles = kind == "cpu" and _compiles and name != "dequantize_4bit" and tensor.numel() >= LEAST
    if (kind != "cuda" and not INTERPRETED and not compiles) or dtype not in DTYPES:
        return None
    if isinstance(tensor, FakeTensor) or kind != tensor.device.type:  # a plan
        from budwood.model.ops.kernels import planned

        return planned if kind == "cuda" or compiles else None
    if tensor.device.type == "meta" or not _passes(name, tensor.device, dtype):
        return None
    _has_compiled |= compiles
    return _functions(tensor.device)


def _functions(device: torch.device) -> ModuleType:
    from budwood.model.ops.kernels import compiled

    if device.type == "cpu" and not INTERPRETED:
        return compiled
    from budwood.model.ops.kernels import launch

    return launch


def _passes(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        return _checked(name, device, dtype)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False  # now; it is checked again


@functools.cache
def _checked(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if importlib.util.find_spec("triton") is None and (device.type == "cuda" or INTERPRETED):
        return False
    try:
        from budwood.model.ops.kernels.checks import CHECKS

        with isolated(), torch.autocast(device.type, enabled=False):
            difference = CHECKS[name](_functions(device), device, dtype)
    except Exception as error:  # a compiler, a driver and a device may fail in any way
        if is_out_of_memory(error):
            raise  # which may not come again, so it is not remembered
        difference = describe(error)
    if difference:
        what = "Triton kernel" if device.type == "cuda" or INTERPRETED else "compiled op"
        problems.append(f"note: the {what} {name} is not used on {device} in {dtype}: {difference}")
    return not difference
