"""Data formats of images: with a class, or alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from budwood import DataFormat, Dropped, InputError
from budwood_vision.images import Source, check_header, resolve, source_of

CLASSIFICATION, MASKED = "image-classification", "masked-image"


@dataclass(frozen=True)
class Picture:
    """An image, and the name of its class, if it has one."""

    source: Source
    label: str | None
    weight: float = 1.0


class PlainImage(DataFormat):
    """An image: a path relative to the data file, bytes, or an image of `datasets`; also a folder of images."""

    api = 2
    name = "image"
    columns: ClassVar[tuple[str, ...]] = ("image",)
    optional = ("weight",)
    tasks: ClassVar[tuple[str, ...]] = (MASKED,)

    def item(self, row: Mapping[str, Any], where: str) -> Picture | Dropped:
        """See `DataFormat.item`; an image's header is read."""
        source, weight = source_of(row.get(self.columns[0]), self.columns[0], where), _weight(row, where)
        check_header(source)
        return Picture(source, None, weight) if weight else Dropped("weight 0")

    def files(self, row: Mapping[str, Any], where: str) -> Sequence[Path]:
        """Return the image's file, unless the row is one of a folder of images, which core hashes by itself."""
        value = row.get(self.columns[0])
        value = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
        return (resolve(value, where),) if isinstance(value, str) else ()


class ImageLabel(PlainImage):
    """An image and its class; also a folder with a folder of images for each class."""

    api = 2
    name = "image-label"
    columns = ("image", "label")
    metadata = ("label",)
    tasks = (CLASSIFICATION,)

    def item(self, row: Mapping[str, Any], where: str) -> Picture | Dropped:
        """See `DataFormat.item`."""
        picture, label = super().item(row, where), row.get("label")
        if isinstance(picture, Dropped):
            return picture
        if isinstance(label, bool) or not isinstance(label, int | str):
            what = "null" if label is None else type(label).__name__
            raise InputError(f"{where}: field 'label' must be text or a whole number, not {what}.")
        name = str(label).strip()
        return Picture(picture.source, name, picture.weight) if name else Dropped("empty label")


class FileName(PlainImage):
    """An image by the name of its file, as in the metadata of `datasets`' image folders."""

    api = 2
    name = "image-file"
    columns = ("file_name",)


class FileNameLabel(ImageLabel):
    """An image by the name of its file, and its class, as in the metadata of `datasets`' image folders."""

    api = 2
    name = "image-file-label"
    columns = ("file_name", "label")


def _weight(row: Mapping[str, Any], where: str) -> float:
    weight = row.get("weight", 1.0)
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise InputError(f"{where}: field 'weight' must be a number of at least 0, not {weight!r}.")
    return float(weight)
