"""Data files, a recipe on the tiny base, and runs of it with what they said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood import Run
from budwood.training.loop import tune
from budwood.training.recipe import Recipe
from budwood.training.report import Report

WORDS = ["games", "section", "library", "terminal", "description", "runtime", "shared", "files", "data", "tokens"]


def write_rows(path: Path, count: int = 16, seed: int = 0, labels: tuple[str, ...] = ()) -> Path:
    """Prompt and completion rows of different lengths; with `labels`, text and label rows."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 9))
        if labels:
            rows.append({"text": " ".join(words), "label": labels[number % len(labels)]})
        else:
            rows.append({"prompt": " ".join(words) + ":", "completion": " " + " ".join(words[:2])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function that makes a recipe of two fp32 steps with LoRA and `distillation` of the given options."""

    def make(
        distillation: dict[str, Any] | None,
        output: str = "run",
        others: tuple[Any, ...] = (),
        labels: tuple[str, ...] = (),
        **sections: Any,
    ) -> Recipe:
        train = {
            "steps": 2, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0, "clip": 0,
        }  # fmt: skip
        task = {"task": "sequence-classification"} if labels else {}
        strategies = [*others, {"lora": {"rank": 4}}]
        if distillation is not None:
            strategies = [{"distillation": distillation}, *strategies]
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", **task, **sections.pop("base", {})},
                "data": {"train": str(write_rows(tmp_path / "train.jsonl", labels=labels)), "max_length": 128},
                "strategies": strategies,
                "train": {**train, **sections.pop("train", {})},
                "output": str(tmp_path / output),
            }
        )

    return make


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All lines that runs say."""
    said: list[str] = []
    monkeypatch.setattr(Report, "say", lambda self, text: said.append(text))
    return said


@pytest.fixture
def run_it(make_recipe: Callable[..., Recipe], lines: list[str]) -> Callable[..., Run]:
    """Function `run_it(options, …)` as `make_recipe` -> the finished run."""
    return lambda *args, **kwargs: tune(make_recipe(*args, **kwargs), quiet=True)
