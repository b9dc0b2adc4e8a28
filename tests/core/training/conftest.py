"""A data file, a recipe on the tiny base, and the test strategies as an installed distribution."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood.training.recipe import Recipe
from budwood.training.report import Report

STRATEGIES = Path(__file__).parents[2] / "strategies"
WORDS = "games section library terminal description runtime shared files data model tokens small headers".split()  # noqa: SIM905


@pytest.fixture
def test_strategies(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the test strategies' distribution on the path; returns their module."""
    monkeypatch.syspath_prepend(str(STRATEGIES))
    module = importlib.import_module("budwood_test_strategies")
    module.SEEN.clear()
    yield module
    sys.modules.pop("budwood_test_strategies", None)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line that runs say."""
    lines: list[str] = []
    monkeypatch.setattr(Report, "say", lambda self, text: lines.append(text))
    return lines


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Prompt and completion rows of different lengths; the completion depends on the prompt's first word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 14))
        rows.append({"prompt": " ".join(words) + ":", "completion": f" {words[0]}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function that makes a recipe of a few fp32 steps; `train`, `base`, `strategies`, … replace parts of it."""

    def make(
        output: str = "run", strategies: list[Any] | None = None, evaluate: bool = False, **sections: Any
    ) -> Recipe:
        train = {
            "steps": 4, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0,
        }  # fmt: skip
        data: dict[str, Any] = {
            "train": str(write_rows(tmp_path / "train.jsonl")),
            "max_length": 128,
        }
        if evaluate:
            data["eval"] = str(write_rows(tmp_path / "eval.jsonl", 8, seed=1))
        changes = sections.pop("train", {})
        if "epochs" in changes:
            train.pop("steps")
        if "batch_tokens" in changes:
            train.pop("batch_examples")
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", **sections.pop("base", {})},
                "data": {**data, **sections.pop("data", {})},
                "strategies": strategies or [{"lora": {"rank": 4}}],
                "train": {**train, **changes},
                "output": str(tmp_path / output),
            }
        )

    return make
