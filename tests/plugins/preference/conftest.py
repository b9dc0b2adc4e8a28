"""Pairs, judged answers and recipes on the tiny base."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from budwood import Run
from budwood.recipe.schema import Recipe

WORDS = ["games", "section", "library", "terminal", "description", "runtime", "shared", "files", "data", "tokens"]


def make_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs of texts of different lengths; the chosen answer repeats the prompt's first word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.sample(WORDS, k=draw.randint(2, 6))
        rejected = " ".join(draw.sample([w for w in WORDS if w != words[0]], k=draw.randint(1, 3)))
        rows.append({"prompt": " ".join(words) + ":", "chosen": f" {words[0]}", "rejected": f" {rejected}"})
    return rows


def judge(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one judged answer of each pair, chosen and rejected ones in turn."""
    sides = ("chosen", "rejected")
    return [
        {"prompt": row["prompt"], "completion": row[sides[i % 2]], "label": i % 2 == 0} for i, row in enumerate(pairs)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stock(run: Run, adapted: bool = True) -> torch.nn.Module:
    """Return transformers' model with the weights of a run's base, its LoRA adapter merged if `adapted`."""
    model = AutoModelForCausalLM.from_pretrained(run.recipe.base.model, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module: Any = run.model.get_submodule(name.rpartition(".")[0])
            if adapted and hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                weight.add_(module.scaling["default"] * (b @ a))
    return model


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function `make_recipe(strategies, rows, output, …)` -> a recipe of a few fp32 steps, without dropout."""

    def make(
        strategies: list[Any], rows: list[Any] | None = None, output: str = "run", evaluate: list[Any] | None = None,
        base: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **train: Any,
    ) -> Recipe:  # fmt: skip
        steps = {
            "steps": 3, "batch_examples": 4, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0,
        }  # fmt: skip
        files: dict[str, Any] = {"train": str(write_rows(tmp_path / "train.jsonl", rows or make_pairs(12)))}
        files["eval"] = "none" if evaluate is None else str(write_rows(tmp_path / "eval.jsonl", evaluate))
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", **(base or {})},
                "data": {**files, "max_length": 128, **(data or {})},
                "strategies": strategies,
                "train": steps | train,
                "output": str(tmp_path / output),
            }
        )

    return make
