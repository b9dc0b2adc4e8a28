"""Augmentations of images with Pillow: mirrored, cropped and rotated at random, in training alone."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from budwood import Options


class ImageOptions(Options):
    """Options of the tasks on images."""

    flip: bool = Field(False, description="mirror every second image, left to right")
    crop: float | None = Field(
        None, gt=0, lt=1, description="cut out a part of at least this share of an image's area, and scale it up again"
    )
    rotate: float | None = Field(None, gt=0, le=180, description="rotate by up to so many degrees to either side")


def augments(options: ImageOptions) -> bool:
    """Return whether anything is augmented."""
    return bool(options.flip or options.crop or options.rotate)


def augment(pixels: np.ndarray, options: ImageOptions, draw: np.random.Generator) -> np.ndarray:
    """Return pixels [C, H, W] uint8 as augmented by `draw`: rotated (black outside), cropped, then mirrored.

    A crop has a share of the area in [crop, 1] and an aspect ratio between 3/4 and 4/3 (Szegedy et al., 2015, "Going
    Deeper with Convolutions", section 6).
    """
    from PIL import Image

    _, height, width = pixels.shape
    angle = draw.uniform(-1, 1) * (options.rotate or 0)
    share, ratio = draw.uniform(options.crop or 1, 1), math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
    places, mirrored = draw.random(2), options.flip and draw.random() < 0.5
    planes = []
    for plane in pixels:
        image = Image.fromarray(plane)
        if options.rotate:
            image = image.rotate(angle, resample=Image.Resampling.BILINEAR)
        if options.crop:
            tall = min(height * math.sqrt(share / ratio), height)
            wide = min(width * math.sqrt(share * ratio), width)
            left, top = places[0] * (width - wide), places[1] * (height - tall)
            image = image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + wide, top + tall))
        planes.append(np.asarray(image))
    result = np.stack(planes)
    return np.ascontiguousarray(result[:, :, ::-1]) if mirrored else result
