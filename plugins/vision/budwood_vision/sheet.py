"""Draws pictures of images: sheets of examples, and masks filled."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

SIDE, MARGIN, LINE = 128, 8, 14
"""Pixels of an image's longer side, between images, and of a line of text."""
COLUMNS = 6
LETTERS = 20
"""Letters of a title that fit below an image."""


def draw_sheet(images: Sequence[tuple[np.ndarray, str]]) -> bytes:
    """Return images [C, H, W] uint8 beside each other, each above its title, as a PNG."""
    from PIL import Image, ImageDraw

    columns = min(COLUMNS, len(images)) or 1
    rows = math.ceil(len(images) / columns) or 1
    cell = (SIDE + MARGIN, SIDE + MARGIN + LINE)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pixels, title) in enumerate(images):
        left, top = MARGIN + number % columns * cell[0], MARGIN + number // columns * cell[1]
        image = Image.fromarray(_as_colours(pixels))
        factor = SIDE / max(image.size)
        size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
        sheet.paste(image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX), (left, top))
        short = title if len(title) <= LETTERS else f"…{title[1 - LETTERS :]}"
        pen.text((left, top + SIDE + 1), short.encode("latin-1", "replace").decode("latin-1"), fill="black")
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _as_colours(pixels: np.ndarray) -> np.ndarray:
    """Return [H, W, 3] of [C, H, W]."""
    return np.ascontiguousarray(np.broadcast_to(pixels.transpose(1, 2, 0), (*pixels.shape[1:], 3)))
