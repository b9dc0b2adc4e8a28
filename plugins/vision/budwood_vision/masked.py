"""The task of masked images: SimMIM (Xie et al., 2022, section 3) and MAE (He et al., 2022, section 3)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from budwood import Batch, Encoder, Example, Generator, InputError, Outputs, skeleton
from budwood_vision.augment import ImageOptions
from budwood_vision.formats import MASKED, Picture
from budwood_vision.task import PIXELS, ImageTask, draws

MASK = "mask"
"""Input of an example: whether each patch is masked, [patches] bool."""
MAE = "vit_mae"
NORMALISED = 1e-6
"""Is added to the variance of a patch, if the base predicts normalised ones."""
GREY = 127
"""Colour of a masked patch in pictures."""


class MaskedImageOptions(ImageOptions):
    """Options of `masked-image`."""

    share: float = Field(0.6, gt=0, lt=1, description="share of an image's patches that are masked and predicted")


class MaskedImage(ImageTask):
    """Predicts the pixels of masked patches; the masks are new in each epoch, and fixed in evaluation."""

    api = 2
    name = MASKED
    auto_class = "AutoModelForMaskedImageModeling"
    Options = MaskedImageOptions
    training_options = ("flip", "crop", "rotate")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.masked, self.mae, self.normalised = 0, False, False
        self.patch = (1, 1)

    def config_of(self, folder: Path) -> Any:
        """Return the base's configuration; an MAE has a model class of its own."""
        kind = skeleton(folder, "AutoModel").config.model_type
        self.mae = kind == MAE
        if self.mae:
            self.auto_class = "AutoModelForPreTraining"  # type: ignore[misc]
        return super().config_of(folder)

    def read_base(self, folder: Path) -> None:
        """Read the sizes, and how many patches the share masks.

        Raises:
            InputError: see `ImageTask.read_base`; or the share masks no patch, or all, or the base reconstructs patches
                of another size than it masks.
        """
        super().read_base(folder)
        config: Any = self.config
        stride = getattr(config, "encoder_stride", None)
        if not self.mae and config.model_type in ("vit", "deit") and stride != self.patch[0]:
            raise InputError(
                f"base '{folder}' reconstructs patches of {stride} pixels (encoder_stride in config.json), but its "
                f"patches have {self.patch[0]}: set encoder_stride to {self.patch[0]}."
            )
        if self.grid[0] != self.grid[1]:
            raise InputError(f"base '{folder}' takes images of {self.grid[0]} × {self.grid[1]} patches, no squares.")
        self.normalised = bool(self.mae and config.norm_pix_loss)
        share, count = self.options.share, self.patches
        kept = int(count * (1 - share))  # as an MAE counts
        self.masked = count - kept if self.mae else round(count * share)
        if not 0 < self.masked < count:
            what = "none" if not self.masked else "all"
            raise InputError(
                f"base.task_options: share: {share:g} of {count} patches masks {what}: at least one must be masked, "
                f"and one seen: give {1 / count:.3g} to {1 - 1 / count:.3g}."
            )

    def patch_of(self, config: Any) -> tuple[int, int]:
        """Return the height and the width of a patch."""
        self.patch = super().patch_of(config)
        return self.patch

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Return the share that an MAE masks; others are given their masks."""
        return {"mask_ratio": self.options.share} if self.mae else {}

    def head_modules(self, model: nn.Module) -> list[str]:
        """Return the names of the decoder's modules, which are outside the model's body."""
        body: Any = model.base_model_prefix
        return [name for name, module in model.named_children() if name != body and [*module.parameters()]]

    def pools_examples(self, model: nn.Module) -> bool:
        """Return False: there is an output for each patch."""
        return False

    def packs_rows(self, model: nn.Module) -> bool:
        """Return False: images are not packed."""
        return False

    def example(self, pixels: np.ndarray, item: Picture, place: str, encoder: Encoder) -> Example:
        """Return an image all of whose patches are labels, by their numbers; `vary` chooses some."""
        every = np.arange(self.patches)
        weights = np.full(len(every), item.weight, dtype=np.float32)
        none = np.zeros(len(every), dtype=bool)
        return Example({PIXELS: pixels, MASK: none}, every, every.astype(np.int32), weights)

    def varies(self) -> bool:
        """Return True: the masks do."""
        return True

    def vary(self, example: Example, generator: Generator) -> Example:
        """Augment the image, in training, and mask patches."""
        return self.with_mask(super().vary(example, generator), draws(generator))

    def with_mask(self, example: Example, draw: np.random.Generator) -> Example:
        """Return the example with a mask of as many patches as `share` says, which are its labels."""
        mask = np.zeros(self.patches, dtype=bool)
        mask[draw.permutation(self.patches)[: self.masked]] = True
        at = np.flatnonzero(mask)
        weights = np.full(len(at), example.weights[0] if len(example.weights) else 1, dtype=np.float32)
        return replace(
            example, inputs={**example.inputs, MASK: mask}, label_positions=at, labels=at.astype(np.int32),
            weights=weights,
        )  # fmt: skip

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """See `Task.probe`: an image with a mask, and its first masked patch as the label."""
        masked = self.with_mask(example, np.random.default_rng(0))
        return replace(
            masked, label_positions=masked.label_positions[:1], labels=masked.labels[:1], weights=masked.weights[:1]
        )

    def as_read(self, example: Example) -> Example:
        """Return the example as the model reads it, with the values of its masked patches as labels."""
        example = super().as_read(example)
        mask = example.inputs[MASK]
        if self.mae:  # it sorts the patches by this and keeps the first
            given = {"noise": (mask + np.arange(len(mask)) / len(mask) / 2).astype(np.float32)}
        else:
            given = {"bool_masked_pos": mask}
        values = example.inputs["pixel_values"]
        labels = self.targets(values)[example.label_positions]
        return replace(example, inputs={"pixel_values": values, **given}, labels=labels)

    def targets(self, values: np.ndarray) -> np.ndarray:
        """Return what the model predicts of pixel values [C, H, W]: [patches, p · q · C], normalised if it does so."""
        patches = torch.from_numpy(values)[None]
        found: np.ndarray = to_patches(patches, self.patch)[0].numpy()
        if self.normalised:
            mean, variance = found.mean(-1, keepdims=True), found.var(-1, ddof=1, keepdims=True)
            found = (found - mean) / np.sqrt(variance + NORMALISED)
        return found

    def collate(self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, packed: bool) -> Batch:
        """Stack the images; each has an output position for each patch."""
        batch = super().collate(examples, model, tokenizer, packed)
        at = np.concatenate([number * self.patches + e.label_positions for number, e in enumerate(examples)])
        return replace(
            batch,
            label_positions=torch.from_numpy(at.astype(np.int64)),
            example_of_position=torch.arange(len(examples)).repeat_interleave(self.patches),
            width=self.patches,
        )

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model: its predictions of all patches are the output."""
        found = model(**batch.inputs)
        hidden = found.logits if self.mae else to_patches(found.reconstruction, self.patch)
        return Outputs(hidden, lambda rows: rows)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean absolute error of each patch; of an MAE, the mean squared error."""
        errors = logits.to(torch.promote_types(logits.dtype, torch.float32)) - labels
        return (errors.square() if self.mae else errors.abs()).mean(-1)

    def labelled_positions(self, batch: Batch) -> Tensor:
        """Return the patches that are masked."""
        mask = torch.zeros(batch.rows * batch.width, dtype=torch.bool, device=batch.label_positions.device)
        return mask.index_fill_(0, batch.label_positions, True)

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return the mask of the first epoch of a run with seed 0, row by row; `budwood data --sheet` draws it."""
        _, height, width = example.inputs[PIXELS].shape
        mask = self.vary(example, Generator(0, 0, example.key)).inputs[MASK].reshape(self.grid)
        patches = " ".join("".join("■" if masked else "□" for masked in row) for row in mask)
        runs = ((masked, "".join(run)) for masked, run in groupby(patches, key="■".__eq__))
        text = f"image, {height} × {width} pixels; masked ■ of its patches: "
        return [(text, False), *((run, masked) for masked, run in runs)]

    def picture(self, example: Example) -> np.ndarray:
        """Return the image with its masked patches in grey."""
        varied = self.vary(example, Generator(0, 0, example.key))
        return self.greyed(varied.inputs[PIXELS], varied.inputs[MASK])

    def greyed(self, pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return pixels [C, H, W] with masked patches in grey."""
        large = np.kron(mask.reshape(self.grid), np.ones(self.patch, dtype=bool))
        return np.where(large[None], GREY, pixels).astype(np.uint8)

    def respond(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """Return for each image, by its path, a mask and its filling.

        Returns:
            Mappings of "masked", the numbers of the masked patches (row by row, of "grid"), "error", their loss, and
            "picture", a PNG in base64: the image, masked, and with its masks filled.
        """
        from budwood_vision.sheet import draw_sheet

        device = next(model.parameters()).device
        answers = []
        for pixels in self.read_images(texts):
            plain = Example({PIXELS: pixels}, np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
            example = self.with_mask(plain, np.random.default_rng(0))
            batch = self.collate([example], model, tokenizer, False).to(device)
            found = self.own_logits(model, batch).float().cpu()
            error = float(self.loss(found, batch.labels.cpu()).mean())
            at, mask = example.label_positions, example.inputs[MASK]
            filled = self.filled(pixels, at, found.numpy())
            picture = draw_sheet([(pixels, "image"), (self.greyed(pixels, mask), "masked"), (filled, "filled")])
            answers.append(
                {"grid": list(self.grid), "masked": at.tolist(), "error": error,
                 "picture": base64.b64encode(picture).decode()}
            )  # fmt: skip
        return answers

    def filled(self, pixels: np.ndarray, at: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Return pixels [C, H, W] with predictions [masked, p · q · C] at the patches `at`."""
        patches = to_patches(torch.from_numpy(self.processor.values(pixels))[None], self.patch)[0].numpy()
        if self.normalised:  # only the true patch has the scale
            own = patches[at]
            predicted = predicted * np.sqrt(own.var(-1, ddof=1, keepdims=True) + NORMALISED) + own.mean(
                -1, keepdims=True
            )
        patches[at] = predicted
        rows, columns = self.grid
        cut = patches.reshape(rows, columns, *self.patch, -1).transpose(4, 0, 2, 1, 3)
        return self.processor.shown(cut.reshape(self.processor.shape))

    def show_response(self, response: Any) -> str:
        """Return how many patches were masked, and the error."""
        rows, columns = response["grid"]
        return f"{len(response['masked'])} of {rows * columns} patches masked, mean error {response['error']:.4f}"


def to_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return [n, patches, p · q · C] of images [n, C, H, W], row by row, as an MAE orders them."""
    n, channels, height, width = images.shape
    p, q = patch
    cut = images.reshape(n, channels, height // p, p, width // q, q).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(n, (height // p) * (width // q), p * q * channels)
