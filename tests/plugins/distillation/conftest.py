"""Data files, recipes on the tiny base, runs and their output, and outputs of stock models."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from budwood import Run
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune
from budwood.training.report import Report

WORDS = ["games", "section", "library", "terminal", "description", "runtime", "shared", "files", "data", "tokens"]
STRATEGIES = Path(__file__).parents[2] / "strategies"


def write_rows(path: Path, count: int = 16, seed: int = 0, labels: tuple[str, ...] = ()) -> Path:
    """Write prompt and completion rows of different lengths; with `labels`, text and label rows."""
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
def test_strategies(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the distribution of the test strategies on the path; yield their module."""
    monkeypatch.syspath_prepend(str(STRATEGIES))
    module = importlib.import_module("budwood_test_strategies")
    module.SEEN.clear()
    yield module
    sys.modules.pop("budwood_test_strategies", None)


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function that returns a recipe of two fp32 steps over all 16 rows, with LoRA and distillation with `options`."""

    def make(
        options: dict[str, Any] | None,
        output: str = "run",
        others: tuple[Any, ...] = (),
        labels: tuple[str, ...] = (),
        lora: dict[str, Any] | None = None,
        **sections: Any,
    ) -> Recipe:
        train = {
            "steps": 2, "batch_examples": 16, "micro_tokens": 1024, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0, "clip": 0,
        }  # fmt: skip
        task = {"task": "sequence-classification"} if labels else {}
        strategies = [{"lora": {"rank": 4, **(lora or {})}}, *others]
        if options is not None:
            strategies.insert(0, {"distillation": options})
        data = {"train": str(write_rows(tmp_path / "train.jsonl", labels=labels)), "max_length": 128}
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", **task, **sections.pop("base", {})},
                "data": {**data, **sections.pop("data", {})},
                "strategies": strategies,
                "train": {**train, **sections.pop("train", {})},
                "output": str(tmp_path / output),
            }
        )

    return make


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All lines printed by runs."""
    output: list[str] = []
    monkeypatch.setattr(Report, "say", lambda self, text: output.append(text))
    return output


@pytest.fixture
def run_it(make_recipe: Callable[..., Recipe], lines: list[str]) -> Callable[..., Run]:
    """Function of `make_recipe`'s arguments -> the finished run."""
    return lambda *args, **kwargs: tune(make_recipe(*args, **kwargs), quiet=True)


@pytest.fixture
def losses() -> Callable[[Run, str], list[float]]:
    """Function `losses(run, name)` -> the values of `name` in metrics.jsonl, one per step."""

    def read(run: Run, name: str = "distillation") -> list[float]:
        rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        return [row[name] for row in rows if row["kind"] == "step"]

    return read


@pytest.fixture
def at_labels() -> Callable[..., tuple[Tensor, Tensor]]:
    """Function `at_labels(run, model)` -> a stock model's logits and last hidden states at every label of the run.

    Each example alone, with the model's own forward, in the order of the file: [labels, V] and [labels, d] float64.
    """

    def read(run: Run, model: Any) -> tuple[Tensor, Tensor]:
        logits, hidden = [], []
        for example in run.examples:
            ids = torch.tensor(example.inputs["input_ids"][None].astype("int64"))
            out = model(ids, use_cache=False, output_hidden_states=True)
            positions = torch.tensor(example.label_positions)
            logits.append(out.logits if run.task.name == "sequence-classification" else out.logits[0, positions])
            hidden.append(out.hidden_states[-1][0, positions])
        return torch.cat(logits).double(), torch.cat(hidden).double()

    return read
