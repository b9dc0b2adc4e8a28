"""A ViT, or an MAE, of two layers on images of 16 × 16 pixels, and images for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE, PATCH = 16, 4
SETTINGS = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}, "do_resize": True,
    "do_rescale": True, "do_normalize": True, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.4, 0.3],
    "rescale_factor": 1 / 255,
}  # fmt: skip


def tiny_vit(folder: Path, kind: str = "masked", channels: int = 3, **changes: Any) -> Path:
    """Save a ViT with random weights and its image processor: with a mask token, without ("plain"), or an MAE."""
    from transformers import (
        ViTConfig,
        ViTForMaskedImageModeling,
        ViTMAEConfig,
        ViTMAEForPreTraining,
        ViTModel,
    )

    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=SIZE,
        patch_size=PATCH, num_channels=channels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # so that no gradient is so small that Adam's step is its rounding
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "mae":
        decoder = dict(decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
        other = dict(decoder_intermediate_size=32, norm_pix_loss=True)
        model: Any = ViTMAEForPreTraining(ViTMAEConfig(**{**sizes, **decoder, **other, **changes}))
    else:
        config = ViTConfig(**{"encoder_stride": PATCH, **sizes, **changes})
        model = ViTForMaskedImageModeling(config) if kind == "masked" else ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    settings = {**SETTINGS, **({} if channels == 3 else {"image_mean": [0.5], "image_std": [0.25]})}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def save_images(folder: Path, count: int, classes: tuple[str, ...] = ("bright", "dark"), seed: int = 0) -> Path:
    """Write images, of other sizes than the model's, to a folder for each class."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        name = classes[number % len(classes)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        low = 120 * (number % len(classes))
        pixels = draw.integers(low, low + 110, (20, 24 + number % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder
