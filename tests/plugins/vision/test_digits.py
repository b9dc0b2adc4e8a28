"""examples/digits: its sets, its base, and its recipes; the example itself takes two minutes."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from budwood.contract.loading import build_task
from budwood.data.build import build_examples
from budwood.planning.composition import plan
from budwood.recipe.schema import load_recipe

HERE = Path(__file__).parents[3] / "examples" / "digits" / "digits.py"


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(HERE)))


def test_the_sets_are_apart_and_their_recipes_have_no_problems(example, tmp_path):
    sets = example.write_images(tmp_path / "data")
    names = {name: {path.name for path in paths} for name, (paths, _) in sets.items()}
    unlabelled = {path.name for path in (tmp_path / "data" / "unlabelled").iterdir()}
    assert {name: len(found) for name, found in names.items()} == example.SIZES
    assert len(unlabelled) == 1797 - 700 and names["train"] <= unlabelled
    assert not unlabelled & (names["dev"] | names["test"]) and not names["dev"] & names["test"]
    assert [path.parent.name for path in sets["dev"][0]] == sets["dev"][1].tolist()
    base = example.make_base(tmp_path / "random")
    task = build_task("image-classification", {})
    task.read_base(base)
    found = build_examples(tmp_path / "data" / "dev", None, task, 16, cache_dir=tmp_path / "cache")
    values = np.stack([task.processor.values(each.inputs["pixels"]) for each in found])
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1, "the processor's settings are those of the data"
    data = {"train": str(tmp_path / "data" / "train"), "eval": str(tmp_path / "data" / "dev")}
    for name, strategies in (("lora", example.lora(example.TRIALS[0])), ("full", example.full())):
        made = {"model": str(base), "task": "image-classification", "task_options": example.AUGMENTED}
        example.recipe(
            name, tmp_path, made, data, strategies, {"steps": 3, "batch_examples": 32, "learning_rate": 1e-3}
        )
        path = tmp_path / "recipes" / f"{name}.json"
        assert load_recipe(path).train.steps == 3 and not plan(path).problems


def test_the_confusions_are_drawn(example, tmp_path, capsys):
    truth = np.array(["0", "1", "1", "2"])
    example.report(truth, ["0", "1", "2", "2"], tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").width > 400
    assert "accuracy" in capsys.readouterr().err
