"""Data files of prompts, and recipes of grpo on the tiny base."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood.recipe.schema import Recipe
from budwood.training.report import Report

WORDS = ["games", "section", "library", "terminal", "description", "runtime", "shared", "files", "data", "tokens"]


def write_rows(path: Path, count: int = 16, completions: bool = False) -> Path:
    """Write prompts with an answer, their first word; with `completions`, also a completion."""
    draw, rows = random.Random(0), []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 6))
        row = {"prompt": " ".join(words) + ":", "answer": words[0], "id": number}
        rows.append({**row, "completion": " " + " ".join(words[:2])} if completions else row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function that returns a recipe of fp32 steps on 16 prompts, with LoRA and grpo with `options`."""

    def make(
        options: dict[str, Any] | None = None,
        output: str = "run",
        others: tuple[Any, ...] = (),
        completions: bool = False,
        **sections: Any,
    ) -> Recipe:
        grpo = {"rewards": [{"regex": {"pattern": "e"}}], "samples": 4, "max_new_tokens": 6, **(options or {})}
        train = {
            "steps": 4, "batch_examples": 4, "micro_tokens": 256, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 8,
        }  # fmt: skip
        data = {"train": str(write_rows(tmp_path / "train.jsonl", completions=completions)), "max_length": 128}
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", **sections.pop("base", {})},
                "data": {**data, **sections.pop("data", {})},
                "strategies": [{"lora": {"rank": 4}}, {"grpo": grpo}, *others],
                "train": {**train, **sections.pop("train", {})},
                "output": str(tmp_path / output),
            }
        )

    return make


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that runs print."""
    lines: list[str] = []
    monkeypatch.setattr(Report, "say", lambda self, text: lines.append(text))
    return lines
