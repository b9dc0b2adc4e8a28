"""Reads a checkpoint tensor by tensor, so that memory never holds both all of it and the converted model."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from budwood.untrusted.formats import TensorInfo

TRIM_EVERY = 8 << 20
"""Bytes read and converted between heap trims. Without trimming, the holes that quantising leaves in the heap grow
larger than the base."""


class _Slice:
    """A tensor of a checkpoint, read when it is indexed; trims the heap periodically."""

    since_trim = 0

    def __init__(
        self, file: Any, name: str, size: int, before: Callable[[], None] | None, dtype: torch.dtype | None
    ) -> None:
        self.file, self.name, self.source = file, name, file.get_slice(name)
        self.size, self.before, self.dtype = size, before, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self.before is not None:
            self.before()
        _Slice.since_trim += self.size
        if _Slice.since_trim > TRIM_EVERY:
            trim_heap()
        complete = index is Ellipsis or index == slice(None)  # a part is read, and then copied
        tensor: torch.Tensor = self.file.get_tensor(self.name) if complete else self.source[index]
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def trim_heap() -> None:
    """Make glibc return free pages between used blocks to the system, which it does not do automatically."""
    _Slice.since_trim = 0
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_memory() -> None:
    """Free all unused memory: call it after a failed allocation, before retrying with less."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def keep_heap() -> None:
    """Make glibc keep freed memory for the next step, instead of returning it and faulting every page in again."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # from malloc.h
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(mmap_threshold, 1 << 30)


def slices(
    tensors: dict[str, TensorInfo], views: bool, before: Callable[[], None] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return every tensor of a checkpoint as a lazy slice.

    Args:
        views: return views of the mapped files without a copy; otherwise read the bytes, because pages of a mapped
            file would still count as memory of the process after conversion.
        before: called before each tensor is read, if they are no views.
        dtypes: what tensors are converted to, by name, if they are no views; others stay as they are stored.
    """
    files: dict[Path, Any] = {}
    for entry in tensors.values():
        if entry.file not in files:
            files[entry.file] = safe_open(entry.file, framework="pt", backend="mmap" if views else "pread")
    if views:
        return {name: files[entry.file].get_slice(name) for name, entry in tensors.items()}
    dtypes = dtypes or {}
    return {
        name: _Slice(files[entry.file], name, entry.bytes, before, dtypes.get(name)) for name, entry in tensors.items()
    }
