"""Picks the device and precision for this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from budwood.errors import InputError, ResourceError


def pick_device_precision(device: str | None, precision: str | None) -> tuple[torch.device, torch.dtype, str]:
    """Choose the device and precision for this machine, unless the user has set them.

    Args:
        device: a torch device such as "cpu" or "cuda:1"; None or "auto": CUDA if available.
        precision: bf16, fp16 or fp32; None or "auto": bf16 if the device computes it natively.

    Returns:
        Device, dtype, and the reason for the precision in words.

    Raises:
        InputError: the device or precision is unknown.
        ResourceError: the machine does not have the device.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in (None, "auto", *dtypes):
        raise InputError(f"precision '{precision}': use {', '.join(dtypes)} or auto.")
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(str(device))
    except RuntimeError as error:
        raise InputError(f"device '{device}': unknown device; use cpu, cuda or cuda:0.") from error
    available = getattr(getattr(torch, chosen.type, None), "is_available", lambda: False)
    if not available():
        raise ResourceError(f"device '{device}': torch {torch.__version__} finds none here; use cpu.")
    if chosen.type == "cpu":
        _limit_kernel_caches()
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"device '{device}': this machine has {torch.cuda.device_count()}, counted from cuda:0.")
    native = _native_precisions(chosen)
    if precision is not None and precision != "auto":
        native_or_full = precision in native or precision == "fp32"
        return (
            chosen,
            dtypes[precision],
            "as requested" if native_or_full else "as requested; this device emulates it, slowly",
        )
    # fp16 needs loss scaling, which is only worth it without bf16 and if fp32 is slow.
    order = ("bf16",) if chosen.type == "cpu" else ("bf16", "fp16")
    precision = next((name for name in order if name in native), "fp32")
    reason = "no fast bf16 here" if precision == "fp32" else "native here"
    return chosen, dtypes[precision], reason


def _limit_kernel_caches() -> None:
    """Limit oneDNN's cache of compiled code, which has an entry per shape: the shapes of packed rows rarely repeat.

    The default limit is 1,024 shapes, which take hundreds of megabytes. oneDNN reads the limit at the first product in
    the process. A setting of the user is kept.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _native_precisions(device: torch.device) -> set[str]:
    """Return the 16-bit precisions that the device multiplies in hardware."""
    if device.type == "cuda":
        return {"fp16", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])}
    if device.type != "cpu":
        return {"fp16", "bf16"}
    has = torch.cpu.get_capabilities()
    flags = {"bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"), "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith")}
    return {name for name, keys in flags.items() if any(has.get(key) for key in keys) and _onednn_multiplies(name)}


def _onednn_multiplies(precision: str) -> bool:
    """Return whether torch uses oneDNN for products in `precision`; `ONEDNN_MAX_CPU_ISA` may disable that."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)  # None: torch without oneDNN
    return supported is None or bool(supported())


def host_memory() -> int:
    """Return the bytes of the host's memory that are available to this process now."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:  # a container's limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or "max"
        return available
    return max(min(available, limit - used), 0)
