"""Opens images from files and bytes: their headers are checked before anything is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import InputError, file_of

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Formats that are read; others run programs or are no pictures."""
PIXELS = 89_478_485
"""Maximum number of pixels of an image: from it on, Pillow warns of a decompression bomb."""
DEEP = ("I", "F")
"""Modes with more than 8 bits per channel begin with these; converting them would cut their values off."""


@dataclass(frozen=True)
class Source:
    """An image of a row.

    Attributes:
        content: the file, or its bytes.
        where: the row's location and the image's name, with which messages begin.
    """

    content: Path | bytes
    where: str


def source_of(value: Any, column: str, where: str) -> Source:
    """Return the image in a field: a path, bytes, or `datasets`' mapping with `bytes` or `path`.

    Raises:
        InputError: it is none of these, or there is no such file.
    """
    name = f"{where}: field '{column}'"
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return Source(bytes(value), name)
    if not isinstance(value, str) or not value.strip():
        what = "null" if value is None else "empty" if isinstance(value, str) else type(value).__name__
        raise InputError(f"{name} must be the path of an image, or its bytes, not {what}.")
    if "://" in value[:12]:
        raise InputError(f"{name}: '{value[:80]}' is an address: download the image, and name its file.")
    path = resolve(value, where)
    if not path.is_file():
        raise InputError(f"{name}: no file '{path}': paths are relative to the data file's folder.")
    return Source(path, f"{where}: image '{path}'")


def resolve(value: str, where: str) -> Path:
    """Return the path of an image that a row names, relative to the folder of its data file."""
    return file_of(where).parent / value


def check_header(source: Source) -> None:
    """Read an image's header.

    Raises:
        InputError: it is empty, no image of a known format, has too many pixels, or more than 8 bits per channel.
    """
    with _opened(source):
        pass


def decode(source: Source, channels: int) -> Image:
    """Return an image with 1 or 3 channels of 8 bits, upright as its EXIF data says; of several frames the first.

    Raises:
        InputError: see `check_header`; or it does not decode.
    """
    from PIL import ImageOps

    with _opened(source) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.convert("L" if channels == 1 else "RGB")


@contextmanager
def _opened(source: Source) -> Iterator[Image]:
    from PIL import Image as pillow

    content = source.content
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if not size:
        raise InputError(f"{source.where} is empty (0 bytes).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit is checked below
            file = io.BytesIO(content) if isinstance(content, bytes) else content
            with pillow.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > PIXELS:
                    raise InputError(
                        f"{source.where} has {width:,} × {height:,} pixels, more than {PIXELS:,}: scale it down."
                    )
                if image.mode.startswith(DEEP):
                    raise InputError(f"{source.where} has more than 8 bits per channel ({image.mode}): save it with 8.")
                yield image
    except InputError:
        raise
    except pillow.DecompressionBombError as error:
        raise InputError(f"{source.where} has more than {PIXELS:,} pixels: scale it down.") from error
    except pillow.UnidentifiedImageError as error:
        raise InputError(f"{source.where} is no image in a known format ({', '.join(FORMATS)}).") from error
    except Exception as error:  # decoders raise any exception on damaged data
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{source.where} does not decode: {reason}.") from error
