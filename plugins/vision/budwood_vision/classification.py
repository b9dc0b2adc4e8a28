"""The task of images' classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from budwood import Batch, Classification, Encoder, Example, Outputs
from budwood_vision.formats import CLASSIFICATION, Picture
from budwood_vision.task import PIXELS, ImageTask


class ImageClassification(ImageTask, Classification):
    """Classification of images; the classes are learned from the training data and stored in the adapter."""

    api = 2
    name = CLASSIFICATION
    auto_class = "AutoModelForImageClassification"
    training_options = ("flip", "crop", "rotate")

    def example(self, pixels: np.ndarray, item: Picture, place: str, encoder: Encoder) -> Example:
        """Return an image with its class."""
        label = encoder.classes.index(item.label or "", place)
        weight = np.full(1, item.weight, dtype=np.float32)
        return Example({PIXELS: pixels}, np.zeros(1, np.int64), np.array([label]), weight)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model: its logits are the output, since models pool in different ways."""
        return Outputs(model(pixel_values=batch.inputs["pixel_values"]).logits[:, None], lambda rows: rows)

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return the image's size; `budwood data --sheet` draws it."""
        channels, height, width = example.inputs[PIXELS].shape
        return [(f"image, {height} × {width} pixels, {channels} channel{'s' if channels > 1 else ''}", False)]

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return {"label": the most probable class, "probabilities": of all classes} of each image, by its path."""
        device = next(model.parameters()).device
        images = [self.processor.values(pixels) for pixels in self.read_images(texts)]
        logits: list[Tensor] = [
            model(pixel_values=torch.from_numpy(image[None]).to(device)).logits[0].float().cpu() for image in images
        ]
        return [self.answer(row, labels) for row in logits]
