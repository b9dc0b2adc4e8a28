"""Recipes of a few steps on the tiny base, and a finished run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood import Run, tune
from budwood.recipe.schema import Recipe

WORDS = "games section library terminal description runtime shared files data model tokens small headers".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.jsonl and eval.jsonl; the completion is the first word of the prompt."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count, seed in (("train", 24, 0), ("eval", 8, 1)):
        draw, lines = random.Random(seed), []
        for _ in range(count):
            words = draw.choices(WORDS, k=draw.randint(2, 14))
            lines.append(json.dumps({"prompt": " ".join(words) + ":", "completion": f" {words[0]}"}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def make_recipe(tiny_base: Path, rows: Path) -> Callable[..., Recipe]:
    """Function `make_recipe(output, options, quantization, evaluate, **train)` -> a recipe of 12 fp32 steps."""

    def make(
        output: Path, options: dict[str, Any], quantization: str = "none", evaluate: bool = False, **train: Any
    ) -> Recipe:
        data = {"train": str(rows / "train.jsonl"), "max_length": 128}
        if evaluate:
            data["eval"] = str(rows / "eval.jsonl")
        steps = {
            "steps": 12, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0,
        }  # fmt: skip
        if "epochs" in train:
            steps.pop("steps")
        strategy = {"initial_rank": 4, "target_rank": 2, "final_phase": 0.3, "interval": 2, **options}
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": quantization},
                "data": data,
                "strategies": [{"adalora": strategy}],
                "train": steps | train,
                "output": str(output),
            }
        )

    return make


@pytest.fixture(scope="session", params=["none", "nf4"])
def trained(
    request: pytest.FixtureRequest, make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A finished run with an evaluation after every step, from rank 6 to a mean rank of 1."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = {"initial_rank": 6, "target_rank": 1}
    return tune(make_recipe(folder, options, request.param, evaluate=True, eval_every=1), quiet=True)
