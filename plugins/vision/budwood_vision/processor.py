"""The image processor of a base, without torchvision: to its size as bytes, then to the values that the model reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from budwood import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "preprocessor_config.json"
EXACT = 1e-5
"""Largest difference of a value from that of the base's own processor."""


class Processor:
    """A base's image processor in two parts: resized images are kept as bytes, values are computed when they are read.

    Attributes:
        shape: (C, H, W) of every image.
    """

    def __init__(self, folder: Path, channels: int) -> None:
        """Read the processor's settings.

        Raises:
            InputError: there are none, or the processor needs torchvision, makes images of different sizes, or does
                more to their values than to scale and shift them.
        """
        if not (folder / FILE).is_file():
            raise InputError(f"base '{folder}' has no {FILE}, which says how it reads images: copy the original's.")
        self._processor = _load(folder)
        self.shape = (channels, 0, 0)
        draw = np.random.default_rng(0)
        tests = [draw.integers(0, 256, (*size, channels), dtype=np.uint8) for size in ((48, 64), (61, 37))]
        made = [self._call(image) for image in tests]
        if made[0].ndim != 3 or made[0].shape != made[1].shape:
            raise InputError(f"base '{folder}': its image processor keeps the sizes of images, but they must be equal.")
        self.shape = made[0].shape
        ends = [self._call(np.full((48, 64, channels), value, dtype=np.uint8), True).reshape(channels, -1)[:, :1]
                for value in (0, 255)]  # fmt: skip
        self._shift = ends[0][..., None].astype(np.float32)
        self._scale = ((ends[1] - ends[0]) / 255)[..., None].astype(np.float32)
        own = self._call(tests[0], True)
        if made[0].dtype != np.uint8 or not np.allclose(self.values(made[0]), own, atol=EXACT * max(1, abs(own).max())):
            name = type(self._processor).__name__
            raise InputError(f"base '{folder}': {name} does more to an image's values than to scale and shift them.")

    def pixels(self, image: Image) -> np.ndarray:
        """Return an image as the model's size, cropped or padded: [C, H, W] uint8."""
        array = np.asarray(image)
        return self._call(array[..., None] if array.ndim == 2 else array)

    def values(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the model reads of pixels [C, H, W] uint8: the same shape in fp32."""
        values: np.ndarray = pixels.astype(np.float32) * self._scale + self._shift
        return values

    def same_values(self, other: Processor) -> bool:
        """Return whether another processor makes the same values of pixels."""
        pairs = ((self._scale, other._scale), (self._shift, other._shift))
        return all(np.allclose(mine, theirs, atol=EXACT) for mine, theirs in pairs)

    def shown(self, values: np.ndarray) -> np.ndarray:
        """Return the pixels uint8 of values, the inverse of `values`."""
        return np.clip((values - self._shift) / self._scale, 0, 255).round().astype(np.uint8)

    def _call(self, image: np.ndarray, values: bool = False) -> np.ndarray:
        changes = {} if values else {"do_rescale": False, "do_normalize": False}
        found = self._processor(image, input_data_format="channels_last", return_tensors="np", **changes)
        return np.ascontiguousarray(found["pixel_values"][0])


def _load(folder: Path) -> Any:
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it says for every processor that torchvision is the default
    try:
        return AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as error:  # it may raise any exception on unexpected values
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"base '{folder}': its image processor ({FILE}) does not load without torchvision: {reason}."
        ) from error
    finally:
        logging.set_verbosity(level)
