"""A strict reader of untrusted JSON and safetensors headers. Imports no torch and unpickles nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from budwood.errors import CorruptError, ResourceError
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_JSON = 4 << 20
"""Size limit of a JSON file, in bytes."""
MAX_HEADER = 16 << 20
"""Size limit of a safetensors header, in bytes: about 100,000 tensors."""

_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as described by a safetensors header; `start` and `end` are byte offsets into `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the tensor, in bytes."""
        return self.end - self.start


def read_json(path: Path, limit: int = MAX_JSON, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        limit: size limit of the file, in bytes.
        finite: refuse NaN and infinity, which are not JSON, although some libraries write them.

    Raises:
        CorruptError: the file is too large, not UTF-8 JSON, nested too deeply, not an object, or has a duplicate key
            or a number that is not finite.
        ResourceError: the file cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would block, a device would never end
            raise CorruptError(f"{path}: not a regular file.")
        size = path.stat().st_size
        if size > limit:
            raise CorruptError(f"{path}: {size:,} bytes; a JSON file may have at most {limit:,}.")
        return parse_object(path.read_bytes(), str(path), finite)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}.") from error


def parse_object(data: bytes, where: str, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object; `where` prefixes messages. See `read_json`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            raise ValueError("duplicate key")
        return value

    def number(text: str) -> float:
        if finite and not math.isfinite(float(text)):  # NaN, Infinity and 1e999
            raise ValueError(f"{text[:20]} is not a finite number")
        return float(text)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise CorruptError(f"{where}: nested too deeply.") from error
    except ValueError as error:  # not UTF-8, not JSON, an integer with thousands of digits
        raise CorruptError(f"{where}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{where}: not a JSON object.")
    return value


def invalid_field(error: ValidationError) -> str:
    """Return "field: what is wrong with its value" for an object from a file that its model refuses.

    Of a field that may have one of several types, pydantic reports every type, with its name in the path; the error
    that is deepest in the value is that of the type that was meant.
    """
    first, *others = error.errors()
    problems = [p for p in (first, *others) if p["loc"][:1] == first["loc"][:1]]
    depth = max(len(p["loc"]) for p in problems)
    deepest = [p for p in problems if len(p["loc"]) == depth]
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        text = f"'{'.'.join(map(str, first['loc'][1:]))}' is missing" if first["loc"][1:] else "is missing"
    elif all(p["msg"].startswith(_SHOULD) for p in deepest):
        wanted = dict.fromkeys(p["msg"].removeprefix(_SHOULD) for p in deepest)
        text = f"should be {' or '.join(wanted)}, not {shorten(json.dumps(deepest[0]['input'], default=str))}"
    else:
        text = deepest[0]["msg"].removeprefix("Value error, ")
    return f"{field}: {text}" if field else text


_SHOULD = "Input should be "


def json_numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Convert numbers by name to valid JSON values: None replaces NaN and infinity."""
    numbers = {name: float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file without reading its tensors.

    Raises:
        CorruptError: the file is not safetensors (a pickle is named as such), its header is larger than 16 MiB or
            than the file, a tensor has an unknown dtype or an impossible shape, or the tensors do not fill the file
            exactly.
        ResourceError: the file cannot be read.
    """
    try:
        if not path.is_file():
            raise CorruptError(f"{path}: not a regular file.")
        size = path.stat().st_size
        with path.open("rb") as file:
            return parse_header(path, file, size)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}.") from error


def parse_header(path: Path, file: BinaryIO, size: int) -> dict[str, TensorInfo]:
    """Read and check the header at the start of a file of `size` bytes; see `read_header`."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        _refuse_other_formats(path, start)  # here, since a sound header of 640 bytes begins as a pickle does
        raise CorruptError(
            f"{path}: truncated or not safetensors: it has {size:,} bytes and claims a header of {length:,}."
        )
    if length > MAX_HEADER:
        raise CorruptError(f"{path}: its header has {length:,} bytes; the limit is {MAX_HEADER:,}.")
    header = parse_object(file.read(length), f"{path}, header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptError(f"{path}: its metadata values are not strings.")
    entries = sorted((_offsets(path, name, entry), name) for name, entry in header.items())
    return {info.name: info for info in _infos(path, header, entries, 8 + length, size)}


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise CorruptError(f"{path}: is a pickle, not safetensors; it was not opened. Convert it if you trust it.")
    if start == b"version ":
        raise CorruptError(f"{path}: is a git-lfs pointer, not the weights: run `git lfs pull`.")


def _infos(
    path: Path, header: dict[str, Any], entries: list[tuple[tuple[int, int], str]], data: int, size: int
) -> Iterator[TensorInfo]:
    """Yield the tensors in file order; they start at byte `data` and must fill the file exactly."""
    end = 0
    for (begin, stop), name in entries:
        dtype, shape = header[name].get("dtype"), header[name].get("shape")
        bits = _BITS.get(dtype) if isinstance(dtype, str) else None
        if bits is None:
            raise CorruptError(f"{path}: tensor '{shorten(name)}' has the unknown dtype {shorten(repr(dtype))}.")
        is_list = isinstance(shape, list) and len(shape) <= 8
        if not (is_list and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)):
            raise CorruptError(f"{path}: tensor '{shorten(name)}' has an impossible shape.")
        if begin != end or (stop - begin) * 8 != math.prod(shape) * bits:
            raise CorruptError(
                f"{path}: tensor '{shorten(name)}' overlaps, leaves a gap, or has the wrong size for its shape."
            )
        end = stop
        yield TensorInfo(name, dtype, tuple(shape), path, data + begin, data + stop)
    if end != size - data:
        raise CorruptError(f"{path}: truncated or padded: tensors end at {end:,} of {size - data:,} bytes.")


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise CorruptError(f"{path}: tensor '{shorten(name)}' has no valid offsets.")
    return offsets[0], offsets[1]
