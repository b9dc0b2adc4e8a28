"""Files that may be hostile, and folders that appear complete or not at all. Imports no torch and unpickles nothing."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.errors import CorruptError, InputError, ResourceError

MAX_JSON = 4 << 20
"""Largest JSON file that is read, in bytes."""
MAX_HEADER = 16 << 20
"""Largest safetensors header that is read, in bytes: about 100,000 tensors."""

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(10)), *(f"lpt{n}" for n in range(10))}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype ("F32", "BF16", …), shape and bytes of a tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


def check_name(name: str, what: str = "adapter") -> str:
    """Return `name` when it can name a file on every system and leave no root.

    Raises:
        InputError: it is empty, longer than 64, a device's name, or holds other than letters, digits, `_`, `-`, `.`.
    """
    shown = name if len(name) <= 40 else name[:37] + "..."
    if len(name) > 64:
        raise InputError(f"{what} name {shown!r} has {len(name)} characters: use at most 64.")
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?", name) or ".." in name:
        raise InputError(f"{what} name {shown!r}: use letters, digits, '_', '-' and '.', and begin with no sign.")
    if name.split(".")[0].lower() in _RESERVED_NAMES:
        raise InputError(f"{what} name {shown!r} is the name of a device: choose another.")
    return name


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CorruptError: it is larger than 4 MiB, not UTF-8 JSON, nested too deep, no object, or has a key twice or a
            number that is not finite.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > MAX_JSON:
            raise CorruptError(f"{path}: {size:,} bytes is no plain JSON file of at most {MAX_JSON:,} bytes.")
        return _parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read: {error.strerror}.") from error


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            raise ValueError("a key stands twice")
        return value

    def number(text: str) -> float:
        if not math.isfinite(float(text)):  # NaN, Infinity and 1e999
            raise ValueError(f"{text[:20]} is no finite number")
        return float(text)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise CorruptError(f"{where}: nested too deep to be read.") from error
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise CorruptError(f"{where}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{where}: holds no JSON object.")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file without reading its tensors.

    Raises:
        CorruptError: it is no safetensors file (a pickle is named as one), its header is larger than 16 MiB or than
            the file, a tensor has an unknown dtype or an impossible shape, or the tensors do not fill the file exactly.
    """
    try:
        if not path.is_file():
            raise CorruptError(f"{path}: no such file.")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
                raise CorruptError(
                    f"{path}: is a pickle, not safetensors; it was not opened. Convert it where you trust it."
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise CorruptError(
                    f"{path}: truncated or not safetensors: {size:,} bytes, and a header of {length:,} is claimed."
                )
            if length > MAX_HEADER:
                raise CorruptError(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER:,} are read.")
            header = _parse_object(file.read(length), f"{path}, header")
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read: {error.strerror}.") from error
    header.pop("__metadata__", None)
    end, tensors = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        info = _tensor_info(path, name, entry)
        begin, stop = _offsets(path, name, entry)
        if begin != end or stop - begin != info.bytes:
            raise CorruptError(f"{path}: tensor '{name}' overlaps, leaves a gap, or has not the bytes of its shape.")
        end, tensors[name] = stop, info
    if end != size - 8 - length:
        raise CorruptError(f"{path}: truncated or padded: tensors end at {end:,} of {size - 8 - length:,} bytes.")
    return tensors


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise CorruptError(f"{path}: tensor '{name}' has no valid offsets.")
    return offsets[0], offsets[1]


def _tensor_info(path: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if dtype not in _ITEM_BYTES:
        raise CorruptError(f"{path}: tensor '{name}' has the unknown dtype {dtype!r}.")
    if not (isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)):
        raise CorruptError(f"{path}: tensor '{name}' has an impossible shape.")
    return TensorInfo(dtype, tuple(shape), math.prod(shape) * _ITEM_BYTES[dtype])


@contextlib.contextmanager
def complete_directory(directory: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `directory` that takes its place, synced to disk, when the block ends well.

    An exception or a crash leaves what was there before. With `replace` an existing folder is exchanged in one
    rename; where the file system cannot exchange, the old one stands beside as `.NAME.old` for an instant.

    Raises:
        InputError: `directory` exists and `replace` is False.
        ResourceError: it cannot be written.
    """
    directory = Path(os.path.abspath(directory))
    if not replace and (directory.is_symlink() or directory.exists()) and not _is_empty_folder(directory):
        raise InputError(f"{directory} exists already: choose another folder, or remove it.")
    partial, old = (directory.with_name(f".{directory.name}.{end}") for end in ("partial", "old"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
    except OSError as error:
        raise ResourceError(f"{directory}: cannot be written: {error.strerror}. Choose another folder.") from error
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            _sync(path)
        _sync(partial)
        if not directory.exists() or not _exchange(partial, directory):
            if directory.exists():
                shutil.rmtree(old, ignore_errors=True)
                directory.rename(old)
            partial.rename(directory)
        _sync(directory.parent)
    except OSError as error:
        raise ResourceError(f"{directory}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what was there before, or what did not become complete
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one atomic rename (Linux); False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
