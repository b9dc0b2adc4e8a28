"""An adapter's tensors, read once: the bytes that are hashed are those that are checked and used."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from budwood.errors import CorruptError, ResourceError
from budwood.untrusted.formats import TensorInfo, parse_header

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of floating-point dtypes in a safetensors header, with torch's."""
_INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
_DTYPES = {**FLOATS, **_INTEGERS, "BOOL": "bool"}


@dataclass(frozen=True)
class Weights:
    """A safetensors file in memory.

    Attributes:
        data: its bytes.
        infos: the tensors in it.
        sha256: hash of `data`, as hex.
    """

    path: Path
    data: Any
    infos: dict[str, TensorInfo]
    sha256: str

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors, views of the one buffer, on the CPU in their stored dtype.

        Raises:
            CorruptError: a tensor holds NaN or infinity, or is of a dtype that no adapter has.
        """
        import torch

        buffer = torch.from_numpy(self.data)
        tensors = {}
        for name, info in self.infos.items():
            if info.dtype not in _DTYPES:
                raise CorruptError(f"{self.path}: tensor '{name[:80]}' has the dtype {info.dtype}, which is not read.")
            part = buffer[info.start : info.end]
            dtype = getattr(torch, _DTYPES[info.dtype])
            if info.start % dtype.itemsize:  # a header that is not padded; torch reads aligned elements only
                part = part.clone()
            tensor = part.view(dtype).view(info.shape)
            # A sum is finite only if every element is, and needs no second tensor; it may overflow where none is not.
            if dtype.is_floating_point and not tensor.sum().isfinite() and not tensor.isfinite().all():
                raise CorruptError(f"{self.path}: tensor '{name}' holds NaN or infinity.")
            tensors[name] = tensor
        return tensors


def check_dtypes(path: Path, infos: Mapping[str, TensorInfo], whole: Collection[str] = ()) -> None:
    """Reject tensors whose dtype a cast would read as other values than were meant.

    Values are floating-point, and positions (`…indices`) are integers. Of modules that are saved whole, buffers such as
    a counter of batches may be either.

    Args:
        whole: ends of the names of modules that are saved whole.

    Raises:
        CorruptError: the message names the tensor.
    """
    for name, info in infos.items():
        last = name.rpartition(".")[2]
        if last not in ("weight", "bias") and any(f"{end}." in name for end in whole):
            continue
        fine = _INTEGERS if last.endswith("indices") else FLOATS
        if info.dtype not in fine:
            raise CorruptError(
                f"{path}: tensor '{name[:80]}' has the dtype {info.dtype}, but must have one of {', '.join(fine)}: "
                "save the adapter again in one of them."
            )


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, check its header, and hash it.

    Raises:
        CorruptError: see `read_header`; or the file became shorter while it was read.
        ResourceError: it cannot be read, or is larger than the machine's memory.
    """
    try:
        if not path.is_file():
            raise CorruptError(f"{path}: not a regular file.")
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):  # a sparse file can claim any size
                claimed = sum(info.bytes for info in parse_header(path, file, size).values())
                raise ResourceError(f"{path}: {claimed:,} bytes of tensors are more than this machine's memory.")
            data: Any = np.empty(size, dtype=np.uint8)
            read, view = 0, memoryview(data)
            while read < size and (count := file.readinto(view[read:])):
                read += count
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}.") from error
    if read < size:
        raise CorruptError(f"{path}: became shorter while it was read.")
    length = min(size, 8 + int.from_bytes(data[:8].tobytes(), "little"))
    infos = parse_header(path, io.BytesIO(data[:length].tobytes()), size)
    return Weights(path, data, infos, hashlib.sha256(view).hexdigest())
