"""Reads a folder of images as rows: one a file, with the name of its folder as the label if there are several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from budwood.data.files import IMAGES
from budwood.data.rows import Row, Rows


class Images(Sequence[Row]):
    """The rows of image files: `image`, the path, and `label`, the name of its folder, if the folders are classes."""

    def __init__(self, files: Sequence[Path], classes: bool) -> None:
        self.files, self.classes = list(files), classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | slice) -> Row | list[Row]:  # type: ignore[override]
        if isinstance(index, slice):
            return [self.row(file) for file in self.files[index]]
        return self.row(self.files[index])

    def size(self, index: int) -> int:
        """Return the size of a file in bytes."""
        return self.files[index].stat().st_size

    def row(self, file: Path) -> Row:
        """Return the row of a file."""
        return {"image": str(file.absolute()), **({"label": file.parent.name} if self.classes else {})}


def read_images(path: Path, files: Sequence[Path]) -> Rows:
    """Return the rows of a folder's images, as `find_files` found them in it or in its folders.

    Args:
        path: the folder, for messages.
    """
    classes = any(file.parent != path for file in files)
    names = [str(file.relative_to(path)) for file in files]
    notes = []
    found = {file.parent for file in files}
    others = [p.name for folder in sorted(found) for p in sorted(folder.iterdir()) if p.suffix.lower() not in IMAGES]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        notes.append(f"{path}: no images, ignored: {shown}")
    columns = ["image", "label"] if classes else ["image"]
    return Rows(path, Images(files, classes), columns, names.__getitem__, notes)
