"""The guarantees of a task, for those on images; tests/plugins/test_task_conformance.py runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.plugins.vision.base import save_images, tiny_vit

from budwood.testing import TaskConformance


class ImageConformance(TaskConformance):
    __test__ = False
    kind: ClassVar[str] = "masked"

    @classmethod
    def make_base(cls, folder: Path) -> Path:
        return tiny_vit(folder, cls.kind)

    @classmethod
    def make_data(cls, folder: Path) -> tuple[Path, Path]:
        return save_images(folder / "train", 12), save_images(folder / "eval", 4, seed=1)

    def test_answers_are_json(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> None:
        image = save_images(tmp_path, 1, classes=("one",)) / "one" / "0.png"
        monkeypatch.setattr(type(self), "text", str(image))
        super().test_answers_are_json(request)


class TestImageClassification(ImageConformance):
    __test__ = True
    task = "image-classification"
    options: ClassVar[dict[str, Any]] = {"flip": True, "crop": 0.5, "rotate": 20}


class TestMaskedImage(ImageConformance):
    """An odd number of patches and different weights, so that no sum of the signs of errors is 0 but for rounding."""

    __test__ = True
    task = "masked-image"
    options: ClassVar[dict[str, Any]] = {"share": 9 / 16}

    @classmethod
    def make_data(cls, folder: Path) -> tuple[Path, Path]:
        for name, images in zip(("train", "eval"), super().make_data(folder), strict=True):
            paths = sorted(str(path.relative_to(folder)) for path in images.glob("*/*"))
            rows = ({"image": path, "weight": 1 + number * 0.3} for number, path in enumerate(paths))
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "train.jsonl", folder / "eval.jsonl"


class TestMaskedAutoencoder(ImageConformance):
    __test__ = True
    task = "masked-image"
    kind = "mae"
    options: ClassVar[dict[str, Any]] = {"share": 0.75, "flip": True}
