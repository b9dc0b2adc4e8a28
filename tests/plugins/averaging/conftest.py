"""Recipes of short runs on the tiny base, and the trainable parameters after each step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from budwood import Run, hookimpl
from budwood.recipe.schema import Recipe
from budwood.training import setup
from budwood.training.loop import train
from budwood.training.report import Report

WORDS = ["games", "section", "library", "terminal", "description", "runtime", "shared", "files", "data", "tokens"]


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function `make_recipe(strategies, output, quantization, evaluate, **train)` -> recipe of six fp32 steps."""

    def make(
        strategies: list[Any], output: str = "run", quantization: str = "none", evaluate: bool = True, **train: Any
    ) -> Recipe:
        for name, count in (("train", 24), ("eval", 8)):
            draw = random.Random(name)
            rows = [draw.choices(WORDS, k=draw.randint(2, 9)) for _ in range(count)]
            lines = [json.dumps({"prompt": " ".join(row) + ":", "completion": f" {row[0]}"}) + "\n" for row in rows]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        data = {"train": str(tmp_path / "train.jsonl"), "max_length": 128}
        steps = {
            "steps": 6, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0,
        }  # fmt: skip
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": quantization},
                "data": data | ({"eval": str(tmp_path / "eval.jsonl")} if evaluate else {}),
                "strategies": strategies,
                "train": steps | train,
                "output": str(tmp_path / output),
            }
        )

    return make


class Watch:
    """Records the trainable parameters after each optimizer step, in float64, by name.

    When ranks are pruned, earlier values are reduced to the remaining elements, as in an average.
    """

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[dict[str, Tensor]] = []
        replace = Run.replace_parameter

        def prune(run: Run, old: torch.nn.Parameter, new: torch.nn.Parameter, index: Any) -> None:
            (name,) = [n for n, p in named(run).items() if p is old]
            replace(run, old, new, index)
            for values in self.steps:
                values[name] = values[name][index]

        monkeypatch.setattr(Run, "replace_parameter", prune)

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        """Record after the strategies, which may prune and mask."""
        self.steps.append({name: p.detach().double().clone() for name, p in named(run).items()})


def named(run: Run) -> dict[str, torch.nn.Parameter]:
    return {f"{group.name}/{name}": p for group in run.groups for name, p in group.parameters.items()}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, list[dict[str, Tensor]]]]:
    """Function `watched(recipe, *others)` -> the finished run with plugins `others`, and the parameters per step."""

    def train_watched(recipe: Recipe, *others: Any) -> tuple[Run, list[dict[str, Tensor]]]:
        run, hooks, engine = setup.prepare(recipe, report := Report(quiet=True), False)
        watch = Watch(run, monkeypatch)
        for number, other in enumerate((watch, *others)):
            hooks.register_core(other, f"other {number}")
        train(run, hooks, engine, report)
        report.close()
        return run, watch.steps

    return train_watched
