"""Kernels for CUDA, in Triton, of the ops in this package: which are used, and their launches.

An op asks for an `implementation`, and otherwise computes with torch. On each device and dtype, a kernel is compared
once with torch's own computation; one that fails or differs is not used, and `problems` says why.
`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels on a CPU, for tests: in fp32 and fp16 only, since
Triton's interpreter computes wrongly in bf16.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from budwood.errors import describe
from budwood.model.device import device_type

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

problems: list[str] = []
"""One line for each kernel that is not used although the device could run it."""


def prepare(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Compile and check all kernels for a CUDA device, and return a line for each that is not used there."""
    if device.type == "cuda" and dtype in DTYPES and importlib.util.find_spec("triton") is not None:
        from budwood.model.ops.kernels.checks import CHECKS

        for name in CHECKS:
            _passes(name, device, dtype)
    return list(problems)


def implementation(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Any:
    """Return the module whose functions compute the op, or None if torch is to compute it.

    The module is `launch`, or `planned`, which allocates the same results on the fake tensors of a plan for CUDA.

    Args:
        name: a key of `checks.CHECKS`.
        tensor: an operand, which determines the device.
        dtype: that of the computation; by default that of the operand.
    """
    kind, dtype = device_type(tensor), dtype or tensor.dtype
    if (kind != "cuda" and not INTERPRETED) or dtype not in DTYPES:
        return None
    if isinstance(tensor, FakeTensor) or kind != tensor.device.type:  # a plan
        from budwood.model.ops.kernels import planned

        return planned if kind == "cuda" else None
    if tensor.device.type == "meta" or not _passes(name, tensor.device, dtype):
        return None
    from budwood.model.ops.kernels import launch

    return launch


@functools.cache
def _passes(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from budwood.model.ops.kernels.checks import CHECKS

        difference = CHECKS[name](device, dtype)
    except Exception as error:  # a compiler, a driver and a device may fail in any way
        difference = describe(error)
    if difference:
        problems.append(f"note: the Triton kernel {name} is not used on {device} in {dtype}: {difference}")
    return not difference
