"""A new classification head is scaled until its logits depend on the input; no other head is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from budwood.recipe.schema import Recipe
from budwood.testing import tiny_encoder
from budwood.training.loop import tune
from budwood.training.new_head import SPREAD

Make = Callable[..., Recipe]
WORDS = "data files for the runtime library shared games fonts tools".split()  # noqa: SIM905
ROWS = [{"text": f"{a} {b}", "label": a[0]} for a in WORDS[:6] for b in WORDS if a != b]
LITTLE = {"learning_rate": 1e-5, "steps": 1, "batch_examples": 1}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An encoder whose config says that a new head is drawn with small values."""
    folder = tiny_encoder(tmp_path / "encoder", WORDS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 0.005}))
    return folder


@pytest.fixture
def classifier(make_recipe: Make, tmp_path: Path) -> Callable[..., Recipe]:
    """Function that returns the recipe of a run that changes next to nothing, on a base."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(base: Path, name: str = "run", **train: object) -> Recipe:
        return make_recipe(
            name, base={"model": str(base), "task": "sequence-classification"},
            data={"train": str(path), "eval": "none"}, train=LITTLE | train,
        )  # fmt: skip

    return make


def spread(model: torch.nn.Module, folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits for row in ROWS]
    return float(torch.cat(logits).std(0).mean())


def test_the_head_of_an_encoder(classifier: Callable[..., Recipe], encoder: Path, said: list[str]) -> None:
    """By a power of two, so that no rounding changes it."""
    run = tune(classifier(encoder))
    (line,) = [line for line in said if line.startswith("new head: ")]
    factor = int(line.split("multiplied by ")[1].split(",")[0])
    assert math.log2(factor).is_integer() and factor > 1
    after = spread(run.model, encoder)
    assert SPREAD / 1.5 < after < 1.5 * SPREAD  # of all rows, not of the examples alone


def test_a_head_that_can_tell_inputs_apart_stays(
    classifier: Callable[..., Recipe], tiny_bases: Callable[..., Path], said: list[str]
) -> None:
    tune(classifier(tiny_bases("wide", initializer_range=0.5)))
    assert not [line for line in said if line.startswith("new head: ")]


def test_a_head_of_the_checkpoint_stays(
    classifier: Callable[..., Recipe], encoder: Path, tmp_path: Path, said: list[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len({row["label"] for row in ROWS}))
    model.save_pretrained(tmp_path / "with-head")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "with-head")
    tune(classifier(tmp_path / "with-head"))
    assert not [line for line in said if line.startswith("new head: ")]


def test_an_adapter_that_is_continued_keeps_its_head(
    classifier: Callable[..., Recipe], encoder: Path, said: list[str]
) -> None:
    first = tune(classifier(encoder, "first"))
    head = first.trainable[-2:]
    said.clear()
    recipe = classifier(encoder, "second").to_dict() | {"adapter": str(first.directory / "adapter")}
    second = tune(Recipe.from_dict(recipe))
    assert not [line for line in said if line.startswith("new head: ")]
    for mine, theirs in zip(second.trainable[-2:], head, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)
