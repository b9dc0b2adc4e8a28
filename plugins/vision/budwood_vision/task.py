"""What the tasks on images have in common: examples and batches of images, and noise on the embeddings of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from budwood import Batch, Dropped, Encoded, Encoder, Example, Generator, InputError, Run, Task, skeleton
from budwood_vision.augment import ImageOptions, augment, augments
from budwood_vision.formats import Picture
from budwood_vision.images import Source, check_header, decode
from budwood_vision.processor import FILE, Processor

PIXELS = "pixels"
"""Input of an example: an image at the model's size, [C, H, W] uint8."""
PATCH = 16
"""Side of the patches by which images count, if the model has none."""
MEASURED = 64
"""Number of images whose patches' embeddings are measured."""


class ImageTask(Task):
    """Base class of tasks on images, which the base's own image processor resizes. Subclasses encode labels."""

    Options = ImageOptions
    needs_tokenizer = False
    answers = "images"
    unused_modules = ("mask_token",)
    config: Any
    """Configuration of the base's model."""
    processor: Processor
    settings: bytes
    """The file that the image processor was read from."""
    grid: tuple[int, int] = (1, 1)
    """Rows and columns of patches."""

    def read_base(self, folder: Path) -> None:
        """Read the image processor and the sizes of images and patches.

        Raises:
            InputError: the base has no model class for the task, or no image processor, or one for other sizes.
        """
        self.config = config = self.config_of(folder)
        self.processor = Processor(folder, int(getattr(config, "num_channels", None) or 3))
        self.settings = (folder / FILE).read_bytes()
        _, height, width = self.processor.shape
        size = _pair(getattr(config, "image_size", None))
        if size is not None and size != (height, width):
            raise InputError(
                f"base '{folder}' takes images of {size[0]} × {size[1]} pixels (config.json), but its image processor "
                f"makes them {height} × {width}: set the size in preprocessor_config.json."
            )
        patch = self.patch_of(config)
        self.grid = (max(height // patch[0], 1), max(width // patch[1], 1))

    def config_of(self, folder: Path) -> Any:
        """Return the configuration of the base, if it has a model class for the task."""
        return skeleton(folder, self.auto_class).config

    def patch_of(self, config: Any) -> tuple[int, int]:
        """Return the height and the width of a patch."""
        return _pair(getattr(config, "patch_size", None)) or (PATCH, PATCH)

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    def encode(self, items: Sequence[Picture], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Task.encode`. Images are kept at the model's size, as bytes."""
        channels = self.processor.shape[0]
        if encoder.max_length and self.patches > encoder.max_length:
            raise InputError(
                f"{where[0]}: an image has {self.patches:,} patches, and is not truncated: raise data.max_length to "
                f"{self.patches}."
            )
        results: list[Encoded | Dropped] = []
        for item, place in zip(items, where, strict=True):
            pixels = self.processor.pixels(decode(item.source, channels))
            results.append(Encoded([self.example(pixels, item, place, encoder)]))
        return results

    def example(self, pixels: np.ndarray, item: Picture, place: str, encoder: Encoder) -> Example:
        """Return the example of an image at the model's size."""
        raise NotImplementedError

    def length(self, example: Example) -> int:
        """Return the number of patches."""
        return self.patches

    def vary(self, example: Example, generator: Generator) -> Example:
        """Augment the image, in training."""
        if generator.evaluates or not augments(self.options):
            return example
        pixels = augment(example.inputs[PIXELS], self.options, draws(generator))
        return replace(example, inputs={**example.inputs, PIXELS: pixels})

    def varies(self) -> bool:
        """Return whether anything is augmented."""
        return augments(self.options)

    def collate(self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, packed: bool) -> Batch:
        """Stack the images, as the model reads them."""
        return super().collate([self.as_read(example) for example in examples], model, tokenizer, packed)

    def as_read(self, example: Example) -> Example:
        """Return the example with `pixel_values` [C, H, W] fp32 in place of its pixels."""
        inputs = {name: value for name, value in example.inputs.items() if name != PIXELS}
        return replace(example, inputs={"pixel_values": self.processor.values(example.inputs[PIXELS]), **inputs})

    def altered(self, model: nn.Module, example: Example) -> Example:
        """Return the example with the image's negative."""
        return replace(example, inputs={**example.inputs, PIXELS: 255 - example.inputs[PIXELS]})

    def check_inputs(self, model: nn.Module, example: Example) -> str:
        """See `Task.check_inputs`."""
        pixels = example.inputs.get(PIXELS)
        if pixels is None or pixels.dtype != np.uint8 or pixels.shape != self.processor.shape:
            return f"a probe is no image of {' × '.join(map(str, self.processor.shape))}"
        return ""

    def reads_otherwise(self, folder: Path) -> str:
        """Return whether the image processor in another folder makes other values."""
        other = Processor(folder, self.processor.shape[0])
        if other.shape != self.processor.shape:
            return (
                f"reads images of {' × '.join(map(str, other.shape))}, not {' × '.join(map(str, self.processor.shape))}"
            )
        return "" if other.same_values(self.processor) else "scales or shifts the values of images differently"

    def read_images(self, paths: Sequence[str]) -> list[np.ndarray]:
        """Return images, by the paths of their files, at the model's size.

        Raises:
            InputError: there is no such file, or it is no image.
        """
        images = []
        for path in paths:
            if not Path(path).is_file():
                raise InputError(f"no image '{path}': give the path of a file.")
            source = Source(Path(path), f"image '{path}'")
            check_header(source)
            images.append(self.processor.pixels(decode(source, self.processor.shape[0])))
        return images

    def sheet(self, examples: Sequence[Example], titles: Sequence[str]) -> bytes:
        """Return a picture of examples as they are in the first epoch of a run with seed 0."""
        from budwood_vision.sheet import draw_sheet

        return draw_sheet([(self.picture(example), title) for example, title in zip(examples, titles, strict=True)])

    def picture(self, example: Example) -> np.ndarray:
        """Return an example as training sees it: [C, H, W] uint8."""
        return self.vary(example, Generator(0, 0, example.key)).inputs[PIXELS]

    def model_files(self, model: nn.Module, max_length: int | None) -> dict[str, bytes]:
        """Return the settings of the image processor."""
        return {FILE: self.settings}

    # Noise on the embeddings of patches.

    def noise_like(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return fp32 zeros [images, patches, d]."""
        shape = (len(batch.keys), self.patches, self.embedding_width(model))
        return torch.zeros(shape, device=batch.label_positions.device)

    def embedding_width(self, model: nn.Module) -> int:
        """Return d, the width of a patch's embedding."""
        projection: Any = self.noise_module(model).projection
        return int(projection.out_channels)

    def embedding_norms(self, run: Run) -> Tensor:
        """Return the norms of the embeddings of patches, of images spread over the data."""
        examples = run.examples if run.examples is not None else run.eval_examples
        assert examples is not None
        chosen = np.unique(np.linspace(0, len(examples) - 1, MEASURED).astype(int))
        module: Any = self.noise_module(run.model)
        weight = module.projection.weight
        images = np.stack([self.processor.values(examples[int(index)].inputs[PIXELS]) for index in chosen])
        with torch.no_grad():
            embedded: Tensor = module(torch.from_numpy(images).to(weight.device, weight.dtype))
        return embedded.float().norm(dim=-1).flatten()

    def noise_owner(self, batch: Batch) -> Tensor:
        """Return [images · patches] int64, the image of each patch."""
        owners = torch.arange(len(batch.keys), device=batch.label_positions.device)
        return owners.repeat_interleave(self.patches)


def draws(generator: Generator) -> np.random.Generator:
    """Return the numbers of a generator for numpy."""
    return np.random.default_rng(generator.torch_generator.initial_seed())


def _pair(size: Any) -> tuple[int, int] | None:
    """Return a size as height and width; None if there is none."""
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None
