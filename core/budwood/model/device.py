"""The device whose code runs: that of the tensors or, in a plan, the device that is planned for.

A plan computes on fake CPU tensors, because torch without CUDA cannot differentiate tensors of a CUDA device. Code that
takes another path on CUDA asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_planned: list[tuple[str, tuple[int, int], int]] = []
_host: list[Callable[[], AbstractContextManager[Any]]] = []


@contextmanager
def planned_device(kind: str, capability: tuple[int, int] = (8, 0), memory: int = 0) -> Iterator[None]:
    """Answer `device_type`, `capability` and `gpu_memory` for a planned device inside the context.

    Args:
        kind: cpu or cuda.
        capability: CUDA's compute capability of the planned device.
        memory: its bytes; 0: unknown.
    """
    _planned.append((kind, capability, memory))
    try:
        yield
    finally:
        _planned.pop()


def device_type(tensor: Tensor) -> str:
    """Return the type of the device that the code for `tensor` is for, such as "cuda"."""
    return _planned[-1][0] if _planned else tensor.device.type


def capability(tensor: Tensor) -> tuple[int, int]:
    """Return CUDA's compute capability of the device that the code for `tensor` is for."""
    return _planned[-1][1] if _planned else torch.cuda.get_device_capability(tensor.device)


def gpu_memory(device: torch.device) -> int:
    """Return the bytes of memory of the GPU that the code is for; 0 if it is for a CPU, or if they are unknown."""
    if _planned:
        kind, _, memory = _planned[-1]
        return memory if kind == "cuda" else 0
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


@contextmanager
def planned_host(counting: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter what `counting` returns wherever `on_host` is entered inside the context."""
    _host.append(counting)
    try:
        yield
    finally:
        _host.pop()


def on_host() -> AbstractContextManager[Any]:
    """Return a context around the allocation of memory that is the host's, also where a plan has only CPU tensors."""
    return _host[-1]() if _host else nullcontext()


@contextmanager
def isolated() -> Iterator[None]:
    """Compute a trial on small tensors in fp32 on the CPU, with gradients, whatever context the caller is in.

    What a trial finds is remembered for the process, so it must not depend on who asked first: a caller in `no_grad`,
    `inference_mode` or autocast, with another default device or dtype, or with fake tensors.
    """
    dtype = torch.get_default_dtype()
    # Not entered in vain: torch compiles anew what was compiled with another default device.
    cpu: Any = torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext()
    with (
        unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad(), cpu,
        torch.autocast("cpu", enabled=False),
    ):  # fmt: skip
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
